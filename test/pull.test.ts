// Bytes in place: whatever a line, a registry or a disk does to a pull, DEST is right or as it was.
import assert from "node:assert/strict";
import { once } from "node:events";
import {
  existsSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { type AddressInfo, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { type ErrorCode, type Progress, Puller } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import { cleanEnvironment, SECRETS, temporaryFolder, USER } from "./support/command.ts";
import {
  digestOf,
  MEDIA,
  makeImage,
  makeLayer,
  makeMultiPlatform,
  readTar,
  type TestContent,
  type TestImage,
  type TestLayer,
} from "./support/image.ts";
import {
  assertFailed,
  assertRight,
  assertUntouched,
  blobBytes,
  checkTar,
  childOf,
  failure,
  LINUX,
  makeSlow,
  pull,
  pullWhole,
  serve,
  tryPull,
} from "./support/pull.ts";
import {
  type Fault,
  gate,
  type Matcher,
  type Registry,
  type RequestRecord,
  startRegistry,
} from "./support/registry.ts";

// Puller reads process.env: a developer's proxies and credentials must not count here.
process.env = cleanEnvironment();

function layersOf(image: TestImage): [TestLayer, TestLayer] {
  return image.layers as [TestLayer, TestLayer];
}

const APP = makeMultiPlatform(["linux/amd64", "linux/arm64"], {
  seed: "app",
  layers: [300_000, 40_000],
});
const APP_IMAGE = childOf(APP);
const [LARGE, SMALL] = layersOf(APP_IMAGE);
const SINGLE = makeImage({ seed: "single", layers: [20_000] });
const SEVERAL_MIB = makeMultiPlatform(["linux/amd64"], {
  seed: "mib",
  layers: [8_000_000, 40_000],
});

// ====== Faults that pass ======

type Rules = [Matcher, Fault][];

const LAYER: Matcher = { digest: LARGE.digest };
const CHILD: Matcher = { kind: "manifest", tag: APP_IMAGE.digest };
const EVERY_KIND: Record<string, Matcher> = {
  index: { kind: "manifest", tag: "1.0" },
  manifest: CHILD,
  config: { kind: "config" },
  layer: LAYER,
};

const PASSING: Record<string, Rules> = {
  "a layer that stalls": [[{ ...LAYER, times: 2 }, { stallAfter: 1000 }]],
  "a manifest that never comes": [[{ ...CHILD, times: 1 }, { wait: new Promise(() => {}) }]],
  "a chunked layer that ends early": [
    [
      { ...LAYER, times: 1 },
      { contentLength: "chunked", dropAfter: 9999 },
    ],
  ],
  "a layer without a length that ends early": [
    [
      { ...LAYER, times: 1 },
      { contentLength: "close", dropAfter: 9999 },
    ],
  ],
  "a layer corrupted in its first byte": [[{ ...LAYER, times: 1 }, { corruptAt: 0 }]],
  "a layer corrupted in its last byte": [
    [{ ...LAYER, times: 1 }, { corruptAt: LARGE.bytes.length - 1 }],
  ],
  "every blob corrupted once": [LARGE, SMALL, APP_IMAGE.config].map(({ digest }) => [
    { digest, times: 1 },
    { corruptAt: 100 },
  ]),
  "a layer of the wrong length once": [
    [
      { ...LAYER, times: 1 },
      { dropAfter: 5000, contentLength: 0 },
    ],
  ],
  "a layer with more behind it than its size, without a length": [
    [LAYER, { body: Buffer.concat([LARGE.bytes, Buffer.from("more")]), contentLength: "chunked" }],
  ],
  "a drop, and a registry that ignores ranges": [
    [{ ...LAYER, times: 1 }, { dropAfter: 150_000 }],
    [{ ...LAYER, ranged: true }, { ignoreRange: true }],
  ],
  "a drop, then no total in Content-Range": [
    [{ ...LAYER, times: 1 }, { dropAfter: 100_000 }],
    [{ ...LAYER, ranged: true }, { headers: { "content-range": "bytes 100000-299999/*" } }],
  ],
  "three drops in a layer, then corruption": [
    [{ ...LAYER, times: 1 }, { dropAt: 50_000 }],
    [{ ...LAYER, times: 1 }, { dropAt: 100_000 }],
    [{ ...LAYER, times: 1 }, { dropAt: 299_999 }],
    [{ ...LAYER, times: 1 }, { corruptAt: 299_999 }],
  ],
};
for (const [kind, matcher] of Object.entries(EVERY_KIND)) {
  PASSING[`${kind}: reset before headers, twice`] = [[{ ...matcher, times: 2 }, { reset: true }]];
  PASSING[`${kind}: answered 503, then dropped in its first bytes`] = [
    [{ ...matcher, times: 1 }, { status: 503 }],
    [{ ...matcher, times: 1 }, { dropAfter: 10 }],
  ];
}

for (const [name, rules] of Object.entries(PASSING)) {
  test(`ends right: ${name}`, async (t) => {
    const served = await serve(t, APP);
    const faults = rules.map(([matcher, fault]) => served.registry.on(matcher, fault));
    await pull(served.reference, served.dest, { timeoutMs: 100 });
    assert.deepEqual(
      faults.map(({ hits }) => hits > 0),
      faults.map(() => true),
      "every fault happened",
    );
    await assertRight(t, served, APP);
  });
}

// What passes is tried again for manifests, tokens, configs and layers alike; wrong bytes are asked
// for once more.
for (const [kind, content, matcher] of [
  ["a platform's manifest", APP, CHILD],
  ["a layer", APP, LAYER],
  ["a config that is fetched with the layers", APP, { kind: "config" }],
  ["a config that tells the platform", SINGLE, { kind: "config" }],
] as [string, TestContent, Matcher][]) {
  test(`corrupted once, fetched once more: ${kind}`, async (t) => {
    const served = await serve(t, content);
    const fault = served.registry.on({ ...matcher, times: 1 }, { corruptAt: 10 });
    await pull(served.reference, served.dest);
    assert.equal(fault.hits, 1);
    assert.equal(served.registry.seen(matcher).length, 2);
    await assertRight(t, served, content);
  });
}

test("a drop at every tenth of a layer goes on from that byte, by a closed range", async (t) => {
  const size = LARGE.bytes.length;
  for (let tenth = 0; tenth < 10; tenth += 1) {
    const served = await serve(t, APP);
    const at = (tenth * size) / 10;
    const drop = served.registry.on({ ...LAYER, times: 1 }, { dropAfter: at });
    await pull(served.reference, served.dest);
    assert.equal(drop.hits, 1);
    const ranges = served.registry.blobRequests(LARGE.digest).map(({ range }) => range);
    assert.deepEqual(ranges, [undefined, at === 0 ? undefined : `bytes=${at}-${size - 1}`]);
    assert.equal(served.registry.bytesServed(LARGE.digest), size, "not a byte twice");
    await assertRight(t, served, APP);
  }
});

test("a layer of several MiB that is dropped at half or at every tenth costs at most 1.1 times its size", async (t) => {
  const [{ digest, bytes }] = layersOf(childOf(SEVERAL_MIB));
  for (const tenths of [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    const served = await serve(t, SEVERAL_MIB);
    const drops = tenths.map((tenth) =>
      served.registry.on({ digest, times: 1 }, { dropAt: Math.floor((tenth * bytes.length) / 10) }),
    );
    await pull(served.reference, served.dest, { concurrency: 2 });
    assert.ok(drops.every(({ hits }) => hits === 1));
    await served.registry.settled();
    const servedBytes = served.registry.bytesServed(digest);
    assert.ok(servedBytes <= 1.1 * bytes.length, `${servedBytes} bytes`);
    await assertRight(t, served, SEVERAL_MIB);
  }
});

test("resume asks the registry again, not the signed URL that has expired meanwhile", async (t) => {
  const served = await serve(t, APP, { storage: { singleUse: true } });
  const { registry } = served;
  registry.on({ kind: "blob" }, { redirect: "storage" });
  const drop = registry.on(
    { kind: "storage", digest: LARGE.digest, times: 1 },
    { dropAfter: 100_000 },
  );
  await pull(served.reference, served.dest);
  assert.equal(drop.hits, 1);
  assert.equal(registry.blobRequests(LARGE.digest).length, 2);
  const ranges = registry.storageRequests(LARGE.digest).map(({ range }) => range);
  assert.deepEqual(ranges, [undefined, "bytes=100000-299999"]);
  await assertRight(t, served, APP);
});

test("a range answered with less than was asked for is taken, and the rest asked for", async (t) => {
  const served = await serve(t, APP);
  served.registry.on({ ...LAYER, times: 1 }, { dropAfter: 100_000 });
  served.registry.on(
    { ...LAYER, ranged: true, times: 1 },
    {
      handler: (_request, response) => {
        const headers = {
          "content-range": "bytes 100000-199999/300000",
          "content-length": "100000",
        };
        response.writeHead(206, headers).end(LARGE.bytes.subarray(100_000, 200_000));
      },
    },
  );
  await pull(served.reference, served.dest);
  const ranges = served.registry.blobRequests(LARGE.digest).map(({ range }) => range);
  assert.deepEqual(ranges, [undefined, "bytes=100000-299999", "bytes=200000-299999"]);
  await assertRight(t, served, APP);
});

test("a registry that cuts every connection in mid-layer and goes on", async (t) => {
  const served = await serve(t, APP);
  const held = gate();
  const pause = served.registry.on(
    { ...LAYER, times: 1 },
    { pause: { after: 120_000, until: held.promise } },
  );
  const pulling = pull(served.reference, served.dest);
  await pause.reached;
  served.registry.disconnect();
  held.open();
  await pulling;
  await assertRight(t, served, APP);
});

test("a storm of 429 on everything is waited out as Retry-After says", async (t) => {
  const served = await serve(t, APP);
  const digests = [
    APP.digest,
    APP_IMAGE.digest,
    APP_IMAGE.config.digest,
    LARGE.digest,
    SMALL.digest,
  ];
  const storms = digests.map((digest) =>
    served.registry.on({ digest, times: 5 }, { status: 429, headers: { "retry-after": "7" } }),
  );
  const { waitsMs } = await pull(served.reference, served.dest, { retries: 5 });
  assert.deepEqual(
    storms.map(({ hits }) => hits),
    [5, 5, 5, 5, 5],
  );
  assert.deepEqual([waitsMs.length, Math.min(...waitsMs)], [25, 7000]);
  await assertRight(t, served, APP);
});

// ====== Faults that stay ======

const STAYING: [string, Matcher, Fault, ErrorCode[], RegExp][] = [
  [
    "a layer always corrupt",
    LAYER,
    { corruptAt: 5 },
    ["DIGEST_MISMATCH"],
    new RegExp(LARGE.digest),
  ],
  ["a config always corrupt", { kind: "config" }, { corruptAt: 5 }, ["DIGEST_MISMATCH"], /sha256:/],
  [
    "a manifest always corrupt",
    CHILD,
    { corruptAt: 5 },
    ["DIGEST_MISMATCH"],
    new RegExp(APP_IMAGE.digest),
  ],
  ["a layer said to be longer", LAYER, { contentLength: 100 }, ["SIZE_MISMATCH"], /300100.*300000/],
  [
    "a layer said to be shorter",
    LAYER,
    { contentLength: -100 },
    ["SIZE_MISMATCH"],
    /299900.*300000/,
  ],
  [
    "a config said to be longer",
    { kind: "config" },
    { contentLength: 1 },
    ["SIZE_MISMATCH"],
    /\/blobs\/sha256:/,
  ],
  [
    "a layer that is shorter, without a length",
    LAYER,
    { body: LARGE.bytes.subarray(0, 200_000), contentLength: "chunked", ignoreRange: true },
    ["SIZE_MISMATCH", "NETWORK"],
    /200000 of 300000/,
  ],
  ["a layer that is gone", LAYER, { status: 404 }, ["NOT_FOUND"], new RegExp(LARGE.digest)],
  ["a layer that is forbidden", LAYER, { status: 403 }, ["FORBIDDEN"], /403/],
  ["a registry that stays down", LAYER, { status: 503 }, ["PROTOCOL"], /503.*scripted answer 503/],
  ["a connection that is always reset", LAYER, { reset: true }, ["NETWORK"], /connection lost/],
  ["a layer that is always dropped at once", LAYER, { dropAfter: 0 }, ["NETWORK"], /0 of 300000/],
  ["a layer that always stalls", LAYER, { stallAfter: 0 }, ["TIMEOUT"], /nothing came for 0.05 s/],
  [
    "a pause longer than one is ready to wait",
    LAYER,
    { status: 429, headers: { "retry-after": "3600" } },
    ["RATE_LIMITED"],
    /3600 s|1 h|60 min/,
  ],
];

for (const [name, matcher, fault, codes, words] of STAYING) {
  test(`fails, with DEST as it was: ${name}`, async (t) => {
    const served = await serve(t, APP);
    writeFileSync(served.dest, "precious");
    const rule = served.registry.on(matcher, fault);
    const error = await failure(pull(served.reference, served.dest, { retries: 2, timeoutMs: 50 }));
    const { code, message } = error;
    assert.ok(codes.includes(code), `${code}: ${message}`);
    assert.match(message, words);
    assert.match(message, /\/v2\/team\/app\/|sha256:/, "says what it was about");
    assert.ok(rule.hits > 0);
    assertUntouched(served);
  });
}

for (const [name, fault, requests] of [
  ["a status that does not pass is not asked for again", { status: 403 }, 1],
  ["a wait beyond two minutes is not begun", { status: 429, headers: { "retry-after": "121" } }, 1],
  ["a wait of two minutes is", { status: 429, headers: { "retry-after": "120" } }, 3],
  ["what is corrupt is asked for once more, not for ever", { corruptAt: 5 }, 2],
  ["--retries counts the attempts after the first", { status: 502 }, 3],
  ["a drip that gets nowhere is given up", { dropAfter: 1 }, 3],
] as [string, Fault, number][]) {
  for (const matcher of "dropAfter" in fault ? [LAYER] : [LAYER, CHILD]) {
    test(`requests of a pull that fails: ${name} (${matcher.kind ?? "layer"})`, async (t) => {
      const served = await serve(t, APP);
      served.registry.on(matcher, fault);
      // Over one connection: while others get on, a refusal is no failure.
      await failure(pull(served.reference, served.dest, { retries: 2, concurrency: 1 }));
      assert.equal(served.registry.seen(matcher).length, requests);
    });
  }
}

// ====== A range that is refused ======
// A server that refuses a range, or does not keep to it, is asked once for the whole, and no more
// for ranges.

const at = 100_000; // where the first answer breaks off
const rest = (headers: Record<string, string | null>): Fault => ({ headers });
const partial = (contentRange: string | null, body: Buffer): Fault => ({
  status: 206,
  headers: { "content-range": contentRange },
  body,
});
const multipart: Fault = {
  status: 206,
  headers: { "content-type": "multipart/byteranges; boundary=x", "content-range": null },
  body: Buffer.concat([Buffer.from("--x\r\n\r\n"), LARGE.bytes.subarray(at)]),
};

const REFUSED_RANGES: Record<string, Fault> = {
  ...Object.fromEntries(
    // containerd#11953, registry.k8s.io#333, harbor#16802 (416), and front ends of all kinds
    [400, 403, 404, 405, 406, 412, 416, 500, 501, 502, 503, 505].map((status) => [
      `answered ${status}`,
      { status },
    ]),
  ),
  "206 without Content-Range": rest({ "content-range": null }),
  "206 of a later place": rest({ "content-range": "bytes 100001-299999/300000" }),
  "206 of an earlier place only": rest({ "content-range": "bytes 0-99999/300000" }),
  "206 of another total": rest({ "content-range": "bytes 100000-299999/300001" }),
  "206 beyond the blob": rest({ "content-range": "bytes 100000-300000/300000" }),
  "206 that ends before it starts": rest({ "content-range": "bytes 100000-99999/300000" }),
  "206 of no range": rest({ "content-range": "bytes */300000" }),
  "206 of another unit": rest({ "content-range": "octets 100000-299999/300000" }),
  "206 with another length than it says": partial("bytes 100000-299999/300000", LARGE.bytes),
  "multipart/byteranges": multipart,
};

for (const [name, fault] of Object.entries(REFUSED_RANGES)) {
  test(`a range ${name}: the whole is asked for once, and no range any more`, async (t) => {
    const served = await serve(t, APP);
    const { registry } = served;
    registry.on({ ...LAYER, times: 1 }, { dropAfter: at });
    registry.on(
      { digest: SMALL.digest, times: 1 },
      { dropAfter: 10_000, wait: registry.arrived(LAYER, 3) },
    );
    const refusal = registry.on({ kind: "layer", ranged: true }, fault);
    await pull(served.reference, served.dest);
    assert.equal(refusal.hits, 1);
    const ranges = registry.seen(LAYER).map(({ range }) => range);
    assert.deepEqual(ranges, [undefined, `bytes=${at}-299999`, undefined]);
    const others = registry.seen({ digest: SMALL.digest }).map(({ range }) => range);
    assert.deepEqual(others, [undefined, undefined]);
    await assertRight(t, served, APP);
  });

  test(`a range ${name} by the storage host alone`, async (t) => {
    const served = await serve(t, APP, { storage: {} });
    const { registry } = served;
    registry.on({ kind: "layer" }, { redirect: "storage" });
    registry.on({ kind: "storage", digest: LARGE.digest, times: 1 }, { dropAfter: at });
    const refusal = registry.on({ kind: "storage", ranged: true }, fault);
    await pull(served.reference, served.dest);
    assert.equal(refusal.hits, 1);
    assert.equal(registry.storageRequests(LARGE.digest).length, 3);
    await assertRight(t, served, APP);
  });
}

for (const [name, fault] of Object.entries({
  "of the whole": partial("bytes 0-299999/300000", LARGE.bytes),
  "from the start of a block": partial("bytes 65536-299999/300000", LARGE.bytes.subarray(65_536)),
  "in capitals": rest({ "content-range": "Bytes 100000-299999/300000" }),
  "without a total": rest({ "content-range": "bytes 100000-299999/*" }),
  "and 200 with all": { ignoreRange: true },
} as Record<string, Fault>)) {
  test(`a range answered with 206 ${name} is used for what it covers`, async (t) => {
    const served = await serve(t, APP);
    const { registry } = served;
    registry.on({ ...LAYER, times: 1 }, { dropAfter: at });
    const answer = registry.on({ ...LAYER, ranged: true }, fault);
    const { fetchedBytes } = await pull(served.reference, served.dest);
    assert.equal(answer.hits, 1);
    assert.equal(registry.seen(LAYER).length, 2);
    assert.equal(fetchedBytes, blobBytes(APP_IMAGE));
    await assertRight(t, served, APP);
  });
}

// ====== Slivers ======
// A server that gives less than it was asked for is asked again for the rest, as long as that gets
// somewhere.

/** A 206 of so many bytes, from where a range begins or from the start. */
const sliver = (sizeBytes: number): Fault => ({
  handler: ({ headers }, response) => {
    const [, first = "0"] = /^bytes=(\d+)-/.exec(headers.range ?? "") ?? [];
    const start = Number(first);
    const end = Math.min(start + sizeBytes, LARGE.bytes.length);
    response.writeHead(206, { "content-range": `bytes ${start}-${end - 1}/300000` });
    response.end(LARGE.bytes.subarray(start, end));
  },
});

for (const [name, faults, requests] of [
  ["a byte a time", [[LAYER, sliver(1)]], 1],
  ["a byte less than is worth a request", [[LAYER, sliver(65_535)]], 1],
  [
    "a byte a time, after a connection was lost",
    [
      [{ ...LAYER, times: 1 }, { dropAfter: at }],
      [LAYER, sliver(1)],
    ],
    3,
  ],
  [
    "its beginning again and again, and no ranges",
    [
      [{ ...LAYER, ranged: true }, { status: 416 }],
      [LAYER, sliver(100_000)],
    ],
    3,
  ],
] as [string, [Matcher, Fault][], number][]) {
  test(`a blob in slivers ends the pull: ${name}`, { timeout: 20_000 }, async (t) => {
    const served = await serve(t, APP);
    for (const [matcher, fault] of faults) served.registry.on(matcher, fault);
    const pulling = pull(served.reference, served.dest, { signal: t.signal });
    const { code, message } = await failure(pulling);
    assert.equal(code, "PROTOCOL");
    assert.match(message, /asked for bytes \d+-299999 of 300000, got "bytes 0-/);
    assert.equal(served.registry.seen(LAYER).length, requests);
  });
}

test("a server that caps its answers is asked for one after the other", async (t) => {
  const served = await serve(t, APP);
  served.registry.on(LAYER, sliver(65_536));
  await pull(served.reference, served.dest);
  assert.equal(served.registry.seen(LAYER).length, 5);
  await assertRight(t, served, APP);
});

test("statuses that mean the same with and without a range are no refusal of one", async (t) => {
  for (const [status, more] of [
    [408, {}],
    [425, {}],
    [429, {}],
    [503, { headers: { "retry-after": "1" } }],
  ] as const) {
    const served = await serve(t, APP);
    const { registry } = served;
    registry.on({ ...LAYER, times: 1 }, { dropAfter: at });
    const once = registry.on({ ...LAYER, ranged: true, times: 1 }, { status, ...more });
    await pull(served.reference, served.dest);
    assert.equal(once.hits, 1);
    const [, ...ranges] = registry.seen(LAYER).map(({ range }) => range);
    assert.deepEqual(ranges, [`bytes=${at}-299999`, `bytes=${at}-299999`], `${status}`);
    await assertRight(t, served, APP);
  }
});

test("a server that refuses ranges, and the whole as well, is told of as it answers the whole", async (t) => {
  const served = await serve(t, APP);
  const { registry } = served;
  registry.on({ ...LAYER, times: 1 }, { dropAfter: at });
  registry.on(LAYER, { status: 403 });
  const error = await failure(pull(served.reference, served.dest));
  assert.equal(error.code, "FORBIDDEN");
  assert.equal(registry.seen(LAYER).length, 3);
});

test("a failure that left bytes says so, and the next pull goes on from them to the byte", async (t) => {
  const served = await serve(t, APP);
  const drop = served.registry.on({ ...LAYER, times: 1 }, { dropAfter: 123_456 });
  const warnings: string[] = [];
  const onWarning = (message: string): void => void warnings.push(message);
  const error = await failure(
    pull(served.reference, served.dest, { retries: 0, concurrency: 1, onWarning }),
  );
  assert.equal(error.code, "NETWORK");
  assert.equal(drop.hits, 1);
  assert.match(warnings.join("\n"), /app\.tar\.partial/);
  await pull(served.reference, served.dest);
  const ranges = served.registry.blobRequests(LARGE.digest).map(({ range }) => range);
  assert.deepEqual(ranges, [undefined, "bytes=123456-299999"]);
  assert.equal(served.registry.bytesServed(), blobBytes(APP_IMAGE));
  await assertRight(t, served, APP);
});

test("a failure before the first byte leaves nothing behind", async (t) => {
  const served = await serve(t, APP);
  served.registry.on({ kind: "blob" }, { status: 404 });
  await failure(pull(served.reference, served.dest));
  assert.deepEqual(readdirSync(served.folder), []);
});

// ====== Requests and connections ======

test("a public multi-platform image behind a token service costs no request too many", async (t) => {
  const { registry, reference, dest } = await serve(t, APP, { auth: "bearer" });
  await pull(reference, dest);
  const asked = registry.requests.map(({ kind, method, status, reference: of }) =>
    [method, kind, status, kind === "token" ? "" : of].join(" "),
  );
  const layers = [LARGE, SMALL].map(({ digest }) => `GET layer 200 ${digest}`);
  assert.deepEqual(asked.slice(0, 4), [
    "GET manifest 401 1.0",
    "GET token 200 ",
    "GET manifest 200 1.0",
    `GET manifest 200 ${APP_IMAGE.digest}`,
  ]);
  assert.deepEqual(asked.slice(4).sort(), [
    `GET config 200 ${APP_IMAGE.config.digest}`,
    ...layers.sort(),
  ]);
  assert.ok(registry.connections() <= 3, `${registry.connections()} connections for three blobs`);
});

test("one connection is enough where the user says so, and is kept alive", async (t) => {
  const { registry, reference, dest } = await serve(t, APP);
  await pull(reference, dest, { concurrency: 1 });
  assert.deepEqual([registry.requests.length, registry.connections()], [5, 1]);
});

// ====== Several connections ======
// A blob begins with one plain GET. A line over which it comes slowly is worth more connections.

const rangesOf = (registry: Registry, digest: string): (string | undefined)[] =>
  registry.blobRequests(digest).map(({ range }) => range);

test("a large layer that comes slowly is fetched over several connections, by closed ranges", {
  timeout: 30_000,
}, async (t) => {
  const served = await serve(t, SEVERAL_MIB);
  const [{ digest }] = layersOf(childOf(SEVERAL_MIB));
  const { registry } = served;
  const slow = makeSlow(registry, digest);
  const { fetchedBytes } = await pull(served.reference, served.dest);
  assert.equal(slow.hits, 1);
  const [first, ...others] = rangesOf(registry, digest);
  assert.equal(first, undefined);
  assert.ok(others.length > 0);
  for (const range of others) assert.match(range ?? "", /^bytes=\d+-\d+$/);
  assert.equal(fetchedBytes, blobBytes(childOf(SEVERAL_MIB)));
  await assertRight(t, served, SEVERAL_MIB);
});

test("ranges that nobody answers are taken back by the connection before them, byte by byte", {
  timeout: 30_000,
}, async (t) => {
  const served = await serve(t, SEVERAL_MIB);
  const [{ digest }] = layersOf(childOf(SEVERAL_MIB));
  const { registry } = served;
  makeSlow(registry, digest);
  const silent = registry.on({ digest, ranged: true }, { wait: new Promise(() => {}) });
  const { fetchedBytes, warnings } = await pull(served.reference, served.dest);
  assert.ok(silent.hits > 0);
  assert.equal(rangesOf(registry, digest).filter((range) => range === undefined).length, 1);
  assert.deepEqual([fetchedBytes, warnings], [blobBytes(childOf(SEVERAL_MIB)), []]);
  await assertRight(t, served, SEVERAL_MIB);
});

for (const [name, fault] of Object.entries({
  "is to come back later": { status: 429, headers: { "Retry-After": "100" } },
  "is to be tried again": { status: 408 },
} as Record<string, Fault>)) {
  test(`a range that ${name} holds nobody up whose bytes have come by then`, {
    timeout: 30_000,
  }, async (t) => {
    const served = await serve(t, SEVERAL_MIB);
    const [{ digest }] = layersOf(childOf(SEVERAL_MIB));
    const { registry } = served;
    makeSlow(registry, digest);
    const rule = registry.on({ digest, ranged: true }, fault);
    const onSleep = async (_ms: number, signal: AbortSignal) => {
      if (!signal.aborted) await once(signal, "abort");
    };
    await pull(served.reference, served.dest, { onSleep });
    assert.ok(rule.hits > 0, "ranges were tried");
    await assertRight(t, served, SEVERAL_MIB);
  });
}

for (const concurrency of [1, 2, 3]) {
  test(`no more than ${concurrency} at once where the user says so`, async (t) => {
    const served = await serve(t, SEVERAL_MIB);
    const [{ digest }] = layersOf(childOf(SEVERAL_MIB));
    const { registry } = served;
    let open = 0;
    let most = 0;
    const count = registry.on(
      { kind: "blob" },
      {
        handler: async (_request, response, next) => {
          open += 1;
          most = Math.max(most, open);
          response.once("close", () => (open -= 1));
          await next();
        },
      },
    );
    if (concurrency > 1) count.remove();
    if (concurrency > 1) makeSlow(registry, digest);
    await pull(served.reference, served.dest, { concurrency });
    assert.ok(most <= concurrency, `${most}`);
    assert.ok(registry.connections() <= concurrency);
    await assertRight(t, served, SEVERAL_MIB);
  });
}

for (const [name, fault] of Object.entries({
  "ignores ranges": { ignoreRange: true },
  "answers ranges with 200 and no length": { ignoreRange: true, contentLength: "chunked" },
  "refuses ranges": { status: 416 },
} as Record<string, Fault>)) {
  test(`over a slow line, a registry that ${name} loses nothing`, {
    timeout: 30_000,
  }, async (t) => {
    const served = await serve(t, SEVERAL_MIB);
    const { registry } = served;
    const [{ digest }] = layersOf(childOf(SEVERAL_MIB));
    makeSlow(registry, digest);
    const rule = registry.on({ digest, ranged: true }, fault);
    await pull(served.reference, served.dest);
    assert.ok(rule.hits > 0, "ranges were tried");
    const whole = rangesOf(registry, digest).filter((range) => range === undefined);
    assert.equal(whole.length, 1, "what was under way was gone on with");
    await assertRight(t, served, SEVERAL_MIB);
  });
}

// ====== A server that admits three connections ======
// It gets fewer, and that costs no attempt while others get on (nerdctl#4428, moby#22443).

const MANY_SMALL = makeMultiPlatform(["linux/amd64"], {
  seed: "many",
  layers: Array.from({ length: 16 }, (_, layer) => 30_000 + layer),
});

/** Takes so many requests at a time, and lets none of them end before it has refused one. */
function admit(registry: Registry, matcher: Matcher, most: number, refusal: Fault) {
  const { status = 0, headers = {} } = refusal;
  const full = gate();
  const told = { refused: 0, isFull: full.promise };
  let open = 0;
  registry.on(matcher, {
    handler: async (_request, response, next) => {
      if (open >= most) {
        told.refused += 1;
        full.open();
        if (refusal.reset) response.socket?.destroy();
        else response.writeHead(status, headers as Record<string, string>).end();
        return;
      }
      open += 1;
      response.once("close", () => (open -= 1));
      await full.promise;
      await next();
    },
  });
  return told;
}

const CROWDED: Record<string, Fault> = {
  "429": { status: 429 },
  "503": { status: 503 },
  "a reset": { reset: true },
  "429 and Retry-After": { status: 429, headers: { "retry-after": "3" } },
};
for (const [name, refusal] of Object.entries(CROWDED)) {
  test(`three connections and no more (${name}), and many small blobs`, async (t) => {
    const served = await serve(t, MANY_SMALL);
    const told = admit(served.registry, { kind: "blob" }, 3, refusal);
    const { warnings, waitsMs } = await pull(served.reference, served.dest, { retries: 0 });
    // Eight are tried at first: five are refused, and the number comes down to what is taken.
    assert.ok(told.refused >= 1 && told.refused <= 5 + 3, `${told.refused} refused`);
    assert.equal(warnings.filter((warning) => /fewer/.test(warning)).length, 1);
    assert.equal(warnings.filter((warning) => /trying again/.test(warning)).length, 0);
    assert.deepEqual(new Set(waitsMs), new Set(refusal.headers ? [3000] : []));
    await assertRight(t, served, MANY_SMALL);
  });

  test(`three connections and no more (${name}), and one large blob`, async (t) => {
    const served = await serve(t, SEVERAL_MIB);
    const [{ digest }] = layersOf(childOf(SEVERAL_MIB));
    const { registry } = served;
    const told = admit(registry, { digest, ranged: true }, 2, refusal);
    registry.on({ digest, times: 1 }, { pause: { after: 300_000, until: told.isFull } });
    const { warnings, fetchedBytes } = await pull(served.reference, served.dest, { retries: 0 });
    assert.ok(told.refused >= 1 && told.refused <= 5 + 3, `${told.refused} refused`);
    assert.equal(warnings.filter((warning) => /trying again/.test(warning)).length, 0);
    assert.equal(fetchedBytes, blobBytes(childOf(SEVERAL_MIB)));
    await assertRight(t, served, SEVERAL_MIB);
  });
}

test("a server that refuses all of them is down: attempts are counted", async (t) => {
  const served = await serve(t, MANY_SMALL);
  writeFileSync(served.dest, "precious");
  const down = served.registry.on({ kind: "blob" }, { status: 503 });
  const error = await failure(pull(served.reference, served.dest, { retries: 2 }));
  assert.match(error.message, /503/);
  assert.ok(down.hits <= 8 + 2 * 8, `${down.hits} requests`);
  assertUntouched(served);
});

test("a blob that is always reset while others move says nothing of the number of connections", async (t) => {
  const several = makeImage({ seed: "one is reset", layers: [8192, 300_000, 300_000, 300_000] });
  const { registry, reference } = await serve(t, several);
  const [first, ...others] = several.layers.map(({ digest }) => digest);
  const rule = registry.on({ digest: first as string }, { reset: true });
  for (const digest of others) registry.on({ digest, times: 1 }, { wait: rule.reached });
  const outcome = await tryPull(t, reference, { ...LINUX, concurrency: 4, retries: 1 });
  assertFailed(outcome, "NETWORK", "connection lost");
  assert.doesNotMatch(outcome.warnings.join(), /fewer/);
});

// ====== Layers of other kinds ======

test("layers that some loaders refuse are warned of, and pulled", async (t) => {
  const cases: [string, TestImage, RegExp | undefined][] = [
    ["gzip", makeImage({ layers: [8192] }), undefined],
    [
      "zstd",
      makeImage({ layers: [{ compression: "zstd", sizeBytes: 9000 }] }),
      /zstd.*Docker before 23/,
    ],
    [
      "Docker's zstd",
      makeImage({ format: "docker", layers: [{ compression: "zstd", sizeBytes: 9000 }] }),
      /zstd/,
    ],
    ["foreign", makeImage({ layers: [{ urls: ["https://127.0.0.1:1/never"] }] }), /foreign/],
    [
      "not compressed",
      makeImage({ layers: [{ compression: "none", sizeBytes: 8192 }] }),
      undefined,
    ],
  ];
  for (const [name, image, words] of cases) {
    const { reference, dest } = await serve(t, image);
    const { warnings } = await pull(reference, dest);
    checkTar(readFileSync(dest), image);
    const said = warnings.filter((warning) => /Docker|foreign/.test(warning)).join("\n");
    if (words) assert.match(said, words, name);
    else assert.equal(said, "", name);
  }
});

test("sha512 digests: pulled to blobs/sha512, and verified", async (t) => {
  const image = makeImage({ seed: "sha512", algorithm: "sha512", layers: [30_000, 20_000] });
  const { registry, folder, dest } = await serve(t, image);
  const reference = registry.add(image, "team/app");
  assert.match(reference, /@sha512:[0-9a-f]{128}$/);
  await pull(reference, dest);
  checkTar(readFileSync(dest), image);
  assert.equal(
    readTar(readFileSync(dest)).filter(({ name }) => /^blobs\/sha512\/./.test(name)).length,
    4,
  );
  const [first] = layersOf(image);
  registry.on({ digest: first.digest }, { corruptAt: 1 });
  const error = await failure(pull(reference, join(folder, "other.tar")));
  assert.equal(error.code, "DIGEST_MISMATCH");
});

test("an empty blob, and one blob used twice, are each there once", async (t) => {
  const empty = Buffer.alloc(0);
  const described = { mediaType: "application/octet-stream", digest: digestOf(empty), size: 0 };
  const image = makeImage({
    seed: "twice",
    layers: [9000],
    editManifest: ({ layers, ...rest }) => ({ ...rest, layers: [...layers, described, ...layers] }),
  });
  image.blobs.set(described.digest, empty);
  const { registry, reference, dest } = await serve(t, image);
  await pull(reference, dest);
  checkTar(readFileSync(dest), image);
  assert.equal(registry.blobRequests(layersOf(image)[0].digest).length, 1);
});

const FOREIGN = makeLayer({ seed: "foreign", sizeBytes: 30_000 });

/**
 * An image whose one layer is at other hosts, and the https host of a registry that has it there.
 */
async function serveForeign(t: TestContext, urls: (host: string) => string[], isHeld: boolean) {
  const authority = makeAuthority();
  const caCert = join(temporaryFolder(t), "ca.pem");
  writeFileSync(caCert, authority.cert);
  const host = await startRegistry({ tls: authority.issueServer() }, t);
  host.putBlob("foreign", FOREIGN.digest, FOREIGN.bytes);
  const layer = { ...FOREIGN, mediaType: MEDIA.ociForeign, urls: urls(host.host) };
  const image = makeImage({ seed: "foreign", layers: [layer] });
  const registry = await startRegistry({ auth: "basic" }, t);
  const reference = registry.add(image, "team/app", "1.0", {
    without: isHeld ? [] : [FOREIGN.digest],
  });
  const dest = join(temporaryFolder(t), "app.tar");
  const opts = { caCert, username: USER, password: SECRETS.password };
  return { host, image, dest, pulling: () => pull(reference, dest, opts) };
}

const foreignUrl = (host: string): string => `https://${host}/v2/foreign/blobs/${FOREIGN.digest}`;

test("foreign layers come from the registry where it has them", async (t) => {
  const { host, image, dest, pulling } = await serveForeign(t, (name) => [foreignUrl(name)], true);
  await pulling();
  checkTar(readFileSync(dest), image);
  assert.equal(host.requests.length, 0);
});

test("foreign layers come from their urls where it does not, by https and without any credential", async (t) => {
  const { host, image, dest, pulling } = await serveForeign(
    t,
    (name) => [
      `http://${name}/v2/foreign/plain`,
      `https://${name}/v2/foreign/blobs/gone`,
      foreignUrl(name),
    ],
    false,
  );
  const drop = host.on({ digest: FOREIGN.digest, times: 1 }, { dropAfter: 10_000 });
  await pulling();
  checkTar(readFileSync(dest), image);
  assert.equal(drop.hits, 1);
  assert.deepEqual(host.requests.map(({ headers }) => headers.authorization).filter(Boolean), []);
  assert.ok(host.requests.every(({ path }) => !path.endsWith("plain")));
});

test("foreign layers are not followed to an address inside a network, nor to plain HTTP", async (t) => {
  const { host, pulling } = await serveForeign(t, (name) => [foreignUrl(name)], false);
  const connections: string[] = [];
  const inside = createServer((socket) => {
    connections.push(String(socket.remoteAddress));
    socket.destroy();
  }).listen(0, "127.0.0.2");
  await once(inside, "listening");
  t.after(() => inside.close());
  const { port } = inside.address() as AddressInfo;

  const targets = [
    `https://127.0.0.2:${port}/`,
    `https://[::ffff:127.0.0.2]:${port}/`,
    "https://169.254.169.254/latest/meta-data",
    "https://[fe80::1]/",
    host.url.replace("https:", "http:"),
  ];
  for (const target of targets) {
    const rule = host.on({ digest: FOREIGN.digest, times: 1 }, { redirect: target });
    const error = await failure(pulling());
    assert.equal(error.code, "PROTOCOL");
    assert.match(error.message, /redirects to .*: not followed/);
    assert.equal(rule.hits, 1);
  }
  assert.deepEqual(connections, []);
});

test("foreign layers that nobody has are an error that names them", async (t) => {
  const { dest, pulling } = await serveForeign(
    t,
    (name) => [`http://${name}/plain`, `file:///etc/passwd`],
    false,
  );
  const error = await failure(pulling());
  assert.equal(error.code, "NOT_FOUND");
  assert.match(error.message, /sha256:/);
  assert.ok(!existsSync(dest));
});

// ====== Stopping, progress, side by side ======

const isLinux = process.platform === "linux";

/** Paths below `folder` that this process holds open; none where that cannot be seen. */
function openFiles(folder: string): string[] {
  if (!isLinux) return [];
  const held = readdirSync("/proc/self/fd").flatMap((fd) => {
    try {
      return [readlinkSync(`/proc/self/fd/${fd}`)];
    } catch {
      return [];
    }
  });
  return held.filter((file) => file.startsWith(folder));
}

/** Every socket that a request comes on, from now. */
function watchSockets(registry: Registry, matcher: Matcher): Set<Socket> {
  const open = new Set<Socket>();
  registry.on(
    { ...matcher, beforeAuth: true },
    {
      handler: async (request, _response, next) => {
        const { socket } = request;
        if (!open.has(socket)) socket.once("close", () => open.delete(socket));
        open.add(socket);
        await next();
      },
    },
  );
  return open;
}

for (const [moment, matcher, fault] of [
  ["while the first answer is awaited", { kind: "manifest" }, { wait: new Promise(() => {}) }],
  [
    "while the token is awaited",
    { kind: "token", beforeAuth: true },
    { wait: new Promise(() => {}) },
  ],
  ["in mid-layer", LAYER, { pause: { after: 100_000, until: new Promise(() => {}) } }],
  ["before a layer's headers", LAYER, { wait: new Promise(() => {}) }],
] as [string, Matcher, Fault][]) {
  test(`signal stops everything ${moment}, with sockets and files closed`, {
    timeout: 30_000,
  }, async (t) => {
    const { registry, reference, folder, dest } = await serve(t, APP, { auth: "bearer" });
    const held = registry.on({ ...matcher, times: 1 }, fault);
    const sockets = watchSockets(registry, {});
    const stop = new AbortController();
    const pulling = failure(
      new Puller({ url: reference, ...LINUX, signal: stop.signal }).pullTar(dest),
    );
    await (fault.pause ? held.reached : registry.arrived(matcher));
    stop.abort();
    const error = await pulling;
    assert.equal(error.code, "ABORTED");
    assert.deepEqual(openFiles(folder), []);
    assert.ok(!existsSync(dest) && !existsSync(`${dest}.partial.lock`));
    await registry.settled();
    while (sockets.size > 0) await new Promise(setImmediate);
  });
}

test("signal ends a back-off at once, and a pull before it has begun", {
  timeout: 30_000,
}, async (t) => {
  const { registry, reference, dest } = await serve(t, APP);
  registry.on({ kind: "layer" }, { status: 503, headers: { "retry-after": "100" } });
  const stop = new AbortController();
  const onWarning = (): void => stop.abort();
  const error = await failure(
    new Puller({ url: reference, ...LINUX, signal: stop.signal, onWarning }).pullTar(dest),
  );
  assert.equal(error.code, "ABORTED");
  registry.forget();
  const again = await failure(
    new Puller({ url: reference, ...LINUX, signal: stop.signal }).pullTar(dest),
  );
  assert.deepEqual([again.code, registry.requests.length], ["ABORTED", 0]);
});

test("onProgress never falls and ends at the total, whatever happens", async (t) => {
  const { registry, reference, dest } = await serve(t, SEVERAL_MIB);
  const [{ digest }] = layersOf(childOf(SEVERAL_MIB));
  const faults = [{ corruptAt: 7 }, { dropAt: 4_000_000 }].map((fault) =>
    registry.on({ digest, times: 1 }, fault),
  );
  const seen: Progress[] = [];
  const onProgress = (progress: Progress): void => void seen.push({ ...progress });
  const result = await new Puller({ url: reference, ...LINUX, onProgress }).pullTar(dest);
  assert.ok(faults.every(({ hits }) => hits === 1));
  const totalBytes = blobBytes(childOf(SEVERAL_MIB));
  assert.deepEqual(seen.at(0), {
    phase: "resolve",
    doneBytes: 0,
    totalBytes: 0,
    fetchedBytes: 0,
    blobsDone: 0,
    blobsTotal: 0,
    moving: [],
  });
  assert.deepEqual(seen.at(-1), {
    phase: "finish",
    doneBytes: totalBytes,
    totalBytes,
    fetchedBytes: result.fetchedBytes,
    blobsDone: 3,
    blobsTotal: 3,
    moving: [],
  });
  const phases = seen.map(({ phase }) => ["resolve", "fetch", "finish"].indexOf(phase));
  for (const [at, { doneBytes, blobsDone }] of seen.entries()) {
    const before = seen[at - 1];
    assert.ok(
      doneBytes >= (before?.doneBytes ?? 0) && blobsDone >= (before?.blobsDone ?? 0),
      `step ${at}`,
    );
    assert.ok((phases[at] ?? 0) >= (phases[at - 1] ?? 0), `phase of step ${at}`);
  }
  const between = seen.filter(
    ({ phase, doneBytes }) => phase === "fetch" && doneBytes > 0 && doneBytes < totalBytes,
  );
  assert.ok(between.length > 1);
  assert.deepEqual(
    [result.sizeBytes, result.layers, result.platform],
    [statSync(dest).size, 2, "linux/amd64"],
  );
  assert.equal(result.fetchedBytes >= totalBytes, true);
});

test("two pullers at once share nothing", async (t) => {
  const { registry, reference, folder } = await serve(t, APP);
  const other = makeMultiPlatform(["linux/amd64"], { seed: "other", layers: [50_000, 60_000] });
  const otherReference = registry.add(other, "team/other", "2.0");
  registry.on({ ...LAYER, times: 1 }, { dropAfter: 1000 });
  const opts = { ...LINUX, signal: new AbortController().signal };
  const [app, second] = await Promise.all([
    pull(reference, join(folder, "app.tar"), opts),
    new Puller({ url: otherReference, ...LINUX }).pullTar(join(folder, "other.tar")),
  ]);
  assert.ok(app.fetchedBytes > 0 && second.name === otherReference);
  checkTar(readFileSync(join(folder, "app.tar")), APP_IMAGE);
  checkTar(readFileSync(join(folder, "other.tar")), childOf(other));
});

test("two pullers at one DEST: the second says so, and does the first no harm", async (t) => {
  const served = await serve(t, APP);
  const held = gate();
  const pause = served.registry.on(
    { ...LAYER, times: 1 },
    { pause: { after: 100_000, until: held.promise } },
  );
  const first = pull(served.reference, served.dest);
  await pause.reached;
  const error = await failure(pull(served.reference, served.dest));
  assert.equal(error.code, "DISK");
  assert.match(error.message, /app\.tar.*another/);
  held.open();
  await first;
  await assertRight(t, served, APP);
});

const MIB = 1024 * 1024;

test("a front end that ignores ranges, beside one that damages: no byte comes twice, and none unhashed", async (t) => {
  const image = makeImage({
    layers: [makeLayer({ seed: "holes", sizeBytes: 12 * MIB, compression: "none" })],
  });
  const served = await serve(t, image);
  const { folder, dest, reference, registry } = served;
  const { plan } = await pullWhole(reference, join(folder, "good.tar"));
  const right = readFileSync(join(folder, "good.tar"));
  const digest = image.layers[0]?.digest as string;
  const { offset } = plan.entries.find(({ blob }) => blob?.descriptor.digest === digest) as {
    offset: number;
  };
  // A killed run left four pieces, so that four ranges are missing between them: the first of them
  // shows that ranges are taken, the others are then asked for side by side.
  const held = [
    [1 * MIB, 2 * MIB],
    [4 * MIB, 5 * MIB],
    [8 * MIB, 9 * MIB],
    [11 * MIB, 12 * MIB],
  ] as const;
  const partial = Buffer.alloc(right.length);
  for (const [from, to] of held) right.copy(partial, offset + from, offset + from, offset + to);
  writeFileSync(`${dest}.partial`, partial);
  const lines = held.map((range) => range.join("-")).join(",");
  writeFileSync(`${dest}.partial.journal`, `${plan.id}\n${digest} ${lines};\n`);
  registry.forget();
  makeSlow(registry, digest);
  const beginsAt = (mib: number) => ({
    digest,
    where: ({ range }: RequestRecord) => range?.startsWith(`bytes=${mib * MIB}-`) === true,
  });
  const first = gate();
  registry.on(beginsAt(2), {
    ignoreRange: true,
    wait: registry.arrived(beginsAt(5)),
    handler: async (_request, response, next) => {
      response.once("finish", first.open);
      await next();
    },
  });
  const damage = registry.on(
    { ...beginsAt(5), times: 1 },
    { wait: first.promise, corruptAt: 6 * MIB },
  );
  const { transfer } = await pullWhole(reference, dest, { concurrency: 2 });
  assert.equal(damage.hits, 1);
  for (const {
    doneBytes,
    descriptor: { size },
  } of transfer?.blobs ?? assert.fail("nothing was transferred"))
    assert.ok(doneBytes <= size);
  assert.ok(readFileSync(dest).equals(right));
});

// The test support is tested on its own: a fault that does not happen would let every other test
// pass.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { createPublicKey, X509Certificate } from "node:crypto";
import { existsSync, writeFileSync } from "node:fs";
import { Agent, request as httpRequest, type IncomingHttpHeaders } from "node:http";
import { request as httpsRequest } from "node:https";
import { join } from "node:path";
import { test } from "node:test";
import * as zlib from "node:zlib";
import { makeAuthority } from "./support/certificates.ts";
import {
  cleanEnvironment,
  recordOutput,
  runCommand,
  SECRETS,
  secretForms,
  seenOutput,
  startCommand,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import {
  digestOf,
  type IndexJson,
  MEDIA,
  makeHelmChart,
  makeImage,
  makeIndex,
  makeLayer,
  makeMultiPlatform,
  makeOrasArtifact,
  pseudoRandom,
  readTar,
  writeTar,
} from "./support/image.ts";
import { type Fault, gate, type RegistryOptions, startRegistry } from "./support/registry.ts";

const { gunzipSync } = zlib;

interface Reply {
  status: number;
  headers: IncomingHttpHeaders;
  body: Buffer;
  error: string | undefined;
}

interface Ask {
  headers?: Record<string, string>;
  method?: string;
  body?: string;
  agent?: Agent;
  tls?: object;
}

/** `body` is what came before the end or the error. */
function ask(
  url: string,
  { headers = {}, method = "GET", body, agent, tls = {} }: Ask = {},
): Promise<Reply> {
  const reply: Reply = { status: 0, headers: {}, body: Buffer.alloc(0), error: undefined };
  return new Promise((done) => {
    const failed = (error: NodeJS.ErrnoException) =>
      done({ ...reply, error: error.code ?? error.message });
    const request = (url.startsWith("https:") ? httpsRequest : httpRequest)(
      url,
      { method, headers, ...(agent ? { agent } : { agent: false }), ...tls },
      (response) => {
        reply.status = response.statusCode ?? 0;
        reply.headers = response.headers;
        response.on("data", (chunk: Buffer) => {
          reply.body = Buffer.concat([reply.body, chunk]);
        });
        response.on("error", failed).on("end", () => done(reply));
      },
    );
    request.on("error", failed).end(body);
  });
}

const image = makeImage({ layers: [200_000, 4096] });
const layer = image.layers[0]?.bytes ?? Buffer.alloc(0);
const layerDigest = image.layers[0]?.digest ?? "";

async function served(t: { after(cleanUp: () => unknown): void }, options: RegistryOptions = {}) {
  const registry = await startRegistry(options, t);
  registry.add(image, "team/app", "1.0");
  const blobUrl = `${registry.url}/v2/team/app/blobs/${layerDigest}`;
  return { registry, blobUrl, manifestUrl: `${registry.url}/v2/team/app/manifests/1.0` };
}

// ====== Images ======

test("layers have the size asked for and are tars that other programs read", (t) => {
  const folder = temporaryFolder(t);
  for (const sizeBytes of [8191, 8192, 8193, 65_536, 200_003, 1_000_000]) {
    const made = makeLayer({
      sizeBytes,
      seed: `size-${sizeBytes}`,
      files: { "bin/hello": "hello\n" },
    });
    assert.equal(made.bytes.length, sizeBytes);
    assert.equal(digestOf(gunzipSync(made.bytes)), made.diffId);
    writeFileSync(join(folder, "layer.tar.gz"), made.bytes);
    const { status, stdout } = spawnSync("tar", [
      "-xzOf",
      join(folder, "layer.tar.gz"),
      "bin/hello",
    ]);
    assert.deepEqual([status, stdout.toString()], [0, "hello\n"]);
    const listed = readTar(gunzipSync(made.bytes)).map(({ name, size }) => [name, size]);
    assert.deepEqual(
      listed,
      [...made.files].map(([name, bytes]) => [name, bytes.length]),
    );
  }
  assert.equal(makeLayer({ sizeBytes: 4096 }).bytes.length, 4096);
  assert.throws(() => makeLayer({ sizeBytes: 100 }), /cannot hold its files/);
});

test("zstd layers are zstd", {
  skip: !("zstdDecompressSync" in zlib) && "this Node has no zstd",
}, () => {
  const made = makeLayer({ sizeBytes: 400_001, compression: "zstd" });
  assert.equal(made.bytes.length, 400_001);
  assert.equal(made.mediaType, MEDIA.ociZstd);
  assert.equal(digestOf(zlib.zstdDecompressSync(made.bytes)), made.diffId);
});

test("the same seed gives the same bytes on every machine", () => {
  assert.equal(
    digestOf(pseudoRandom("imgpull", 1000)),
    "sha256:bab4be8a84bcc9d1dd57e9c9baea623fd693bfad53d9fdbb493805eb79f569b7",
  );
  assert.equal(
    makeImage({ seed: "fixed", layers: [5000] }).digest,
    "sha256:e2edf9383aeb9f94b79411562fc3d778953f2a6681337fdfa3dc6fdc880d2e70",
  );
});

test("manifests describe what is there, in both formats", () => {
  for (const format of ["oci", "docker"] as const) {
    const multi = makeMultiPlatform(["linux/amd64", "linux/arm/v7"], {
      format,
      attestations: format === "oci",
    });
    assert.equal(multi.index.manifests.length, format === "oci" ? 4 : 2);
    assert.deepEqual(multi.index.manifests[1]?.platform, {
      os: "linux",
      architecture: "arm",
      variant: "v7",
    });
    for (const { digest, size } of multi.index.manifests) {
      const held = multi.manifests.get(digest)?.bytes ?? Buffer.alloc(0);
      assert.deepEqual([held.length, digestOf(held)], [size, digest]);
      const { config, layers } = JSON.parse(held.toString());
      for (const part of [config, ...layers]) {
        const blob = multi.blobs.get(part.digest) ?? Buffer.alloc(0);
        assert.deepEqual([blob.length, digestOf(blob)], [part.size, part.digest]);
      }
    }
    assert.deepEqual(JSON.parse(multi.bytes.toString()), multi.index);
  }
  const nested = makeIndex([makeIndex([image]), makeHelmChart(), makeOrasArtifact()]);
  const { manifests }: IndexJson = JSON.parse(nested.bytes.toString());
  assert.deepEqual(
    manifests.map((entry) => entry.mediaType),
    [MEDIA.ociIndex, MEDIA.ociManifest, MEDIA.ociManifest],
  );
  assert.ok(nested.blobs.has(layerDigest) && nested.manifests.has(image.digest));
  assert.match(makeImage({ algorithm: "sha512" }).config.digest, /^sha512:[0-9a-f]{128}$/);
  const broken = makeImage({ editManifest: (manifest) => ({ ...manifest, layers: "none" }) });
  assert.equal(JSON.parse(broken.bytes.toString()).layers, "none");
});

test("readTar refuses damaged tars", () => {
  const tar = writeTar([["a", Buffer.from("abc")]]);
  const damaged = (at: number) => {
    const copy = Buffer.from(tar);
    copy[at] = 1;
    return copy;
  };
  assert.deepEqual(
    readTar(tar).map(({ name, offset, size, mode, mtime }) => ({
      name,
      offset,
      size,
      mode,
      mtime,
    })),
    [{ name: "a", offset: 512, size: 3, mode: 0o644, mtime: 0 }],
  );
  assert.throws(() => readTar(damaged(5)), /checksum/);
  assert.throws(() => readTar(damaged(600)), /padding/);
  assert.throws(() => readTar(damaged(tar.length - 1)), /trailer/);
  assert.throws(() => readTar(tar.subarray(0, 1024)), /trailer/);
});

// ====== The registry as it should be ======

test("manifests and blobs are served by tag, digest and range", async (t) => {
  const { registry, blobUrl, manifestUrl } = await served(t, { etag: true });
  const agent = new Agent({ keepAlive: true });
  t.after(() => agent.destroy());
  const manifest = await ask(`${manifestUrl}?ns=quay.io`, { agent });
  assert.deepEqual(
    [manifest.status, manifest.headers["content-type"], manifest.headers["docker-content-digest"]],
    [200, MEDIA.ociManifest, image.digest],
  );
  assert.ok(manifest.body.equals(image.bytes));
  const head = await ask(`${registry.url}/v2/team/app/manifests/${image.digest}`, {
    agent,
    method: "HEAD",
  });
  assert.deepEqual(
    [head.status, head.headers["content-length"], head.body.length],
    [200, String(image.bytes.length), 0],
  );

  assert.ok((await ask(blobUrl, { agent })).body.equals(layer));
  const etag = `"${layerDigest}"`;
  const cases: [string, string, number, string | undefined, Buffer][] = [
    ["bytes=10-19", etag, 206, "bytes 10-19/200000", layer.subarray(10, 20)],
    ["bytes=199990-", etag, 206, "bytes 199990-199999/200000", layer.subarray(199_990)],
    ["bytes=-10", etag, 206, "bytes 199990-199999/200000", layer.subarray(199_990)],
    ["bytes=10-19", '"other"', 200, undefined, layer],
  ];
  for (const [range, ifRange, status, contentRange, body] of cases) {
    const reply = await ask(blobUrl, { agent, headers: { range, "if-range": ifRange } });
    assert.deepEqual([reply.status, reply.headers["content-range"]], [status, contentRange], range);
    assert.ok(reply.body.equals(body), range);
  }
  const beyond = await ask(blobUrl, { agent, headers: { range: "bytes=200000-" } });
  assert.deepEqual([beyond.status, beyond.headers["content-range"]], [416, "bytes */200000"]);

  assert.equal((await ask(`${registry.url}/v2/team/app/manifests/2.0`, { agent })).status, 404);
  assert.match(
    String((await ask(`${registry.url}/v2/nobody/manifests/2.0`, { agent })).body),
    /NAME_UNKNOWN/,
  );
  assert.equal(registry.connections("registry"), 1);
  assert.equal(registry.requests[0]?.query.get("ns"), "quay.io");
  assert.equal(registry.blobRequests(layerDigest).length, 6);
  assert.equal(registry.bytesServed(layerDigest), 400_030);
  assert.equal(registry.seen({ kind: "config" }).length, 0);
  await ask(`${registry.url}/v2/team/app/blobs/${image.config.digest}`, { agent });
  assert.equal(registry.seen({ kind: "config" })[0]?.digest, image.config.digest);
});

// ====== Faults ======

const HALF = 100_000;
const flipped = Buffer.from(layer);
flipped[HALF] = (flipped[HALF] ?? 0) ^ 0xff;
const FAULTS: [string, Fault, Ask, (reply: Reply) => void][] = [
  [
    "drop",
    { dropAfter: HALF },
    {},
    ({ error, body }) => assert.deepEqual([error, body.length], ["ECONNRESET", HALF]),
  ],
  [
    "drop at once",
    { dropAfter: 0 },
    {},
    (reply) =>
      assert.deepEqual([reply.status, reply.error, reply.body.length], [200, "ECONNRESET", 0]),
  ],
  [
    "drop at a place",
    { dropAt: HALF },
    { headers: { range: "bytes=99000-" } },
    ({ status, error, body }) =>
      assert.deepEqual([status, error, body.length], [206, "ECONNRESET", 1000]),
  ],
  [
    "reset",
    { reset: true },
    {},
    ({ status, error }) => assert.deepEqual([status, error], [0, "ECONNRESET"]),
  ],
  ["corrupt", { corruptAt: HALF }, {}, ({ body }) => assert.ok(body.equals(flipped))],
  [
    "corrupt in a range",
    { corruptAt: HALF },
    { headers: { range: "bytes=100000-100001" } },
    ({ body }) => assert.ok(body.equals(flipped.subarray(HALF, HALF + 2))),
  ],
  [
    "too long a length",
    { contentLength: 5 },
    {},
    ({ headers, error, body }) =>
      assert.deepEqual(
        [headers["content-length"], error, body.length],
        ["200005", "ECONNRESET", 200_000],
      ),
  ],
  [
    "too short a length",
    { contentLength: -5 },
    {},
    ({ headers, body }) =>
      assert.deepEqual([headers["content-length"], body.length], ["199995", 199_995]),
  ],
  [
    "chunked",
    { contentLength: "chunked" },
    {},
    ({ headers, error, body }) =>
      assert.deepEqual(
        [headers["transfer-encoding"], headers["content-length"], error, body.length],
        ["chunked", undefined, undefined, 200_000],
      ),
  ],
  [
    "close",
    { contentLength: "close" },
    {},
    ({ headers, error, body }) =>
      assert.deepEqual(
        [headers["transfer-encoding"], headers["content-length"], error, body.length],
        [undefined, undefined, undefined, 200_000],
      ),
  ],
  [
    "no ranges",
    { ignoreRange: true },
    { headers: { range: "bytes=5-9" } },
    ({ status, body }) => assert.deepEqual([status, body.length], [200, 200_000]),
  ],
  [
    "wrong Content-Range",
    { headers: { "content-range": "bytes 0-4/200000" } },
    { headers: { range: "bytes=5-9" } },
    ({ status, headers }) =>
      assert.deepEqual([status, headers["content-range"]], [206, "bytes 0-4/200000"]),
  ],
  [
    "status",
    { status: 429, headers: { "retry-after": "7" } },
    {},
    ({ status, headers, body }) =>
      assert.deepEqual(
        [status, headers["retry-after"], JSON.parse(String(body)).errors.length],
        [429, "7", 1],
      ),
  ],
  [
    "other body",
    { body: "<html>", headers: { "content-type": "text/html" } },
    {},
    ({ status, headers, body }) =>
      assert.deepEqual(
        [status, headers["content-type"], String(body)],
        [200, "text/html", "<html>"],
      ),
  ],
  [
    "no headers",
    { headers: { "content-type": null, "docker-content-digest": null } },
    {},
    ({ headers }) =>
      assert.deepEqual(
        [headers["content-type"], headers["docker-content-digest"]],
        [undefined, undefined],
      ),
  ],
  [
    "gzip",
    { contentEncoding: "gzip" },
    {},
    ({ headers, body }) => {
      assert.equal(headers["content-encoding"], "gzip");
      assert.ok(gunzipSync(body).equals(layer));
    },
  ],
  [
    "redirect",
    { redirect: "https://elsewhere.example/x", redirectStatus: 302 },
    {},
    ({ status, headers }) =>
      assert.deepEqual([status, headers.location], [302, "https://elsewhere.example/x"]),
  ],
  [
    "handler",
    {
      handler: (_request, response, next) => {
        response.setHeader("x-odd", "1");
        return next();
      },
    },
    {},
    ({ headers, body }) => assert.deepEqual([headers["x-odd"], body.length], ["1", 200_000]),
  ],
];

for (const secure of [false, true]) {
  for (const [name, fault, asked, check] of FAULTS) {
    test(`fault over ${secure ? "https" : "http"}: ${name}`, async (t) => {
      const authority = makeAuthority();
      const { registry, blobUrl } = await served(t, secure ? { tls: authority.issueServer() } : {});
      const rule = registry.on({ digest: layerDigest, times: 1 }, fault);
      const tls = secure ? { ca: authority.cert } : {};
      check(await ask(blobUrl, { ...asked, tls }));
      assert.equal(rule.hits, 1);
      assert.equal((await rule.reached).digest, layerDigest);
      const after = await ask(blobUrl, { tls });
      assert.deepEqual(
        [after.status, after.body.equals(layer)],
        [200, true],
        "the fault holds once",
      );
    });
  }
}

test("a stall sends so much and no more, until the client or close() ends it", async (t) => {
  const { registry, blobUrl } = await served(t);
  const rule = registry.on({ kind: "layer" }, { stallAfter: 70_000 });
  const reply = ask(blobUrl);
  assert.equal((await rule.reached).bytesSent, 70_000);
  await registry.close();
  const { error, body } = await reply;
  assert.deepEqual([error, body.length], ["ECONNRESET", 70_000]);
  await registry.settled();
});

test("a pause goes on and a wait is answered when the gate opens", async (t) => {
  const { registry, blobUrl, manifestUrl } = await served(t);
  const opened = gate();
  const pausing = registry.on({ kind: "layer" }, { pause: { after: HALF, until: opened.promise } });
  registry.on({ kind: "manifest" }, { wait: opened.promise });
  const replies = [ask(blobUrl), ask(manifestUrl)];
  assert.equal((await pausing.reached).bytesSent, HALF);
  await registry.arrived({ kind: "manifest" });
  assert.equal(registry.manifestRequests()[0]?.status, 0);
  opened.open();
  const [blob, manifest] = await Promise.all(replies);
  assert.ok(blob?.body.equals(layer) && manifest?.body.equals(image.bytes));
});

test("rules pass, count and end as told", async (t) => {
  const { registry, blobUrl } = await served(t);
  const far = registry.on({ digest: layerDigest }, { dropAfter: 5_000_000 });
  const elsewhere = registry.on({ digest: layerDigest, times: 1 }, { corruptAt: HALF });
  await ask(blobUrl, { headers: { range: "bytes=0-9" } });
  assert.deepEqual([far.hits, elsewhere.hits], [0, 0], "positions beyond the answer do not count");
  elsewhere.remove();
  const second = registry.on({ kind: "blob", skip: 1, times: 1 }, { status: 503 });
  const statuses = [];
  for (let round = 0; round < 3; round += 1) statuses.push((await ask(blobUrl)).status);
  assert.deepEqual([statuses, second.hits], [[200, 503, 200], 1]);
});

// ====== Authorization ======

const basic = `Basic ${Buffer.from(`${USER}:${SECRETS.password}`).toString("base64")}`;

test("basic: challenge, then the content; outside tokens too", async (t) => {
  const { manifestUrl } = await served(t, {
    auth: { mode: "basic", outsideToken: SECRETS.outsideToken },
  });
  const refused = await ask(manifestUrl);
  assert.deepEqual(
    [refused.status, refused.headers["www-authenticate"]],
    [401, 'Basic realm="test registry"'],
  );
  for (const [authorization, status] of [
    [basic, 200],
    [`Basic ${SECRETS.outsideToken}`, 200],
    ["Basic eA==", 401],
  ]) {
    assert.equal(
      (await ask(manifestUrl, { headers: { authorization: String(authorization) } })).status,
      status,
    );
  }
});

test("bearer: challenge, token for its repository only, staleness", async (t) => {
  const auth = {
    mode: "bearer",
    tokenServer: "second",
    tokenUses: 2,
    expiresIn: 300,
    tokenField: "both",
  } as const;
  const { registry, manifestUrl } = await served(t, { auth });
  registry.add(image, "other/app", "1.0");
  const challenge = String((await ask(manifestUrl)).headers["www-authenticate"]);
  assert.equal(
    challenge,
    `Bearer realm="${registry.tokenUrl}",service="test-registry",scope="repository:team/app:pull"`,
  );
  assert.notEqual(new URL(registry.tokenUrl).host, registry.host);
  const scoped = `${registry.tokenUrl}?scope=repository:team/app:pull`;
  const answer = await ask(scoped, { headers: { authorization: basic } });
  const { token, access_token: same, expires_in: expiresIn } = JSON.parse(String(answer.body));
  assert.deepEqual([same, expiresIn], [token, 300]);
  const headers = { authorization: `Bearer ${token}` };
  const elsewhere = await ask(manifestUrl.replace("team/", "other/"), { headers });
  assert.match(String(elsewhere.headers["www-authenticate"]), /insufficient_scope/);
  const statuses = [];
  for (let round = 0; round < 3; round += 1)
    statuses.push((await ask(manifestUrl, { headers })).status);
  assert.deepEqual(statuses, [200, 200, 401]);
  const wrong = await ask(registry.tokenUrl, { headers: { authorization: "Basic eA==" } });
  assert.equal(wrong.status, 401);
  assert.equal(registry.tokenRequests().length, 2);
});

test("bearer: OAuth2 POST, refusals, odd challenges", async (t) => {
  const { registry, manifestUrl } = await served(t, {
    auth: {
      mode: "bearer",
      anonymous: "useless",
      staleStatus: 400,
      realm: "/token?account=me",
      service: null,
      challenge: (usual) => ["Negotiate", `Basic realm="a, b", ${usual}`],
    },
  });
  const challenge = String((await ask(manifestUrl)).headers["www-authenticate"]);
  assert.equal(
    challenge,
    'Negotiate, Basic realm="a, b", Bearer realm="/token?account=me",scope="repository:team/app:pull"',
  );
  const form = (token: string) =>
    ask(registry.tokenUrl, {
      method: "POST",
      body: `grant_type=refresh_token&refresh_token=${token}&scope=repository%3Ateam%2Fapp%3Apull`,
    });
  assert.equal((await form("wrong")).status, 401);
  const good = JSON.parse(String((await form(SECRETS.identityToken)).body)).access_token;
  const useless = await ask(`${registry.url}/token?scope=repository:team/app:pull`);
  const { token } = JSON.parse(String(useless.body));
  const opened = (bearer: string) =>
    ask(manifestUrl, { headers: { authorization: `Bearer ${bearer}` } });
  assert.deepEqual([(await opened(good)).status, (await opened(token)).status], [200, 401]);
  registry.expireTokens();
  const stale = await opened(good);
  assert.deepEqual([stale.status, stale.headers["www-authenticate"]], [400, undefined]);
});

test("faults leave unauthorized requests alone unless told", async (t) => {
  const { registry, manifestUrl } = await served(t, { auth: "bearer" });
  registry.on({ kind: "manifest" }, { status: 500 });
  assert.equal((await ask(manifestUrl)).status, 401);
  registry.on({ kind: "manifest", beforeAuth: true }, { status: 502 });
  assert.equal((await ask(manifestUrl)).status, 502);
  registry.on({ kind: "token" }, { status: 503 });
  assert.equal((await ask(registry.tokenUrl)).status, 503);
});

test("storage: signed URLs, single use, expiry, no Authorization, relative redirects", async (t) => {
  const { registry, blobUrl, manifestUrl } = await served(t, { storage: { singleUse: true } });
  registry.on({ kind: "layer" }, { redirect: "storage" });
  registry.on({ kind: "manifest" }, { redirect: "self", redirectStatus: 302 });
  const moved = String((await ask(blobUrl)).headers.location);
  assert.ok(moved.startsWith(`${registry.storageUrl}/store/`));
  assert.equal((await ask(moved, { headers: { authorization: basic } })).status, 400);
  const reply = await ask(moved, { headers: { range: "bytes=1-2" } });
  assert.deepEqual([reply.status, reply.body.equals(layer.subarray(1, 3))], [206, true]);
  assert.equal((await ask(moved)).status, 403);
  const again = String((await ask(blobUrl)).headers.location);
  registry.expireSignatures();
  assert.equal((await ask(again)).status, 403);
  const relative = String((await ask(manifestUrl)).headers.location);
  assert.match(relative, /^\/store\//);
  assert.ok((await ask(registry.url + relative)).body.equals(image.bytes));
  assert.equal(registry.bytesServed(), 2);
});

test("storage has a challenge of its own", async (t) => {
  const { registry } = await served(t, {
    storage: { challenge: 'Bearer realm="https://elsewhere.example/token"' },
  });
  const reply = await ask(registry.storageUrl + registry.signedPath(layerDigest));
  assert.deepEqual(
    [reply.status, reply.headers["www-authenticate"]],
    [401, 'Bearer realm="https://elsewhere.example/token"'],
  );
});

// ====== Certificates ======

test("certificates: node:tls takes them, refuses another CA, a wrong name, an expired one; mTLS", async (t) => {
  const authority = makeAuthority();
  const stranger = makeAuthority("stranger");
  const certificate = new X509Certificate(authority.issueServer().cert);
  assert.ok(certificate.verify(createPublicKey(authority.cert)));
  assert.ok(!certificate.verify(createPublicKey(stranger.cert)));
  assert.deepEqual(
    [certificate.validFrom, certificate.validTo],
    ["Jan  1 00:00:00 2020 GMT", "Dec 31 23:59:59 2099 GMT"],
  );
  assert.equal(certificate.subjectAltName, "DNS:localhost, IP Address:127.0.0.1");

  const reach = async (server: RegistryOptions["tls"], tls: object) => {
    const { registry, manifestUrl } = await served(t, server && { tls: server });
    const { status, error } = await ask(manifestUrl, { tls });
    return { status, error, client: registry.requests[0]?.clientCertificate };
  };
  const plain = authority.issueServer();
  assert.equal((await reach(plain, { ca: authority.cert })).status, 200);
  assert.equal(
    (await reach(plain, { ca: stranger.cert })).error,
    "UNABLE_TO_VERIFY_LEAF_SIGNATURE",
  );
  const elsewhere = authority.issueServer({ dns: ["elsewhere.example"], ip: [] });
  assert.equal(
    (await reach(elsewhere, { ca: authority.cert })).error,
    "ERR_TLS_CERT_ALTNAME_INVALID",
  );
  const expired = authority.issueServer({ notAfter: new Date("2021-01-01T00:00:00Z") });
  assert.equal((await reach(expired, { ca: authority.cert })).error, "CERT_HAS_EXPIRED");

  const mutual = { ...plain, clientCa: authority.cert };
  const known = await reach(mutual, {
    ca: authority.cert,
    ...authority.issueClient({ commonName: "me" }),
  });
  assert.deepEqual([known.status, known.client], [200, "me"]);
  assert.equal((await reach(mutual, { ca: authority.cert })).status, 0);
  assert.equal((await reach(mutual, { ca: authority.cert, ...stranger.issueClient() })).status, 0);
});

// ====== Commands ======

const node = process.execPath;

test("commands: output, exit code, stdin, clean environment, signals, the guard", async (t) => {
  process.env.HTTPS_PROXY = "http://proxy.example";
  t.after(() => delete process.env.HTTPS_PROXY);
  assert.deepEqual(Object.keys(cleanEnvironment()), [
    "PATH",
    "HOME",
    "XDG_RUNTIME_DIR",
    "TMPDIR",
    "LANG",
  ]);
  const script =
    "process.stdin.on('data', (d) => process.stdout.write(d)).on('end', () => {" +
    "console.error(process.env.HTTPS_PROXY, process.env.MINE, process.argv[1]); process.exitCode = 3 })";
  let heard = "";
  const result = await runCommand(["word"], {
    command: [node, "-e", script],
    stdin: "given",
    env: { MINE: "yes" },
    onStderr: (text) => {
      heard += text;
    },
  });
  assert.deepEqual(
    { ...result, stdout: String(result.stdout) },
    { exitCode: 3, signal: null, stdout: "given", stderr: "undefined yes word\n" },
  );
  assert.equal(heard, result.stderr);

  const waiting = "console.log('up'); process.stdin.resume()";
  const abort = new AbortController();
  const stopped = await runCommand([], {
    command: [node, "-e", waiting],
    stdin: "open",
    signal: abort.signal,
    onStdout: () => abort.abort(),
  });
  assert.deepEqual([stopped.exitCode, stopped.signal], [null, "SIGINT"]);
  const { child, result: killed } = startCommand([], {
    command: [node, "-e", waiting],
    stdin: "open",
  });
  child.kill("SIGKILL");
  assert.equal((await killed).signal, "SIGKILL");
  await assert.rejects(
    runCommand([], { command: [node, "-e", waiting], stdin: "open", guardMs: 1 }),
    /still running/,
  );
  await assert.rejects(runCommand([], { command: ["/no/such/program"] }), { code: "ENOENT" });
});

test("what was seen can be searched for secrets in every form", () => {
  recordOutput("a harmless word");
  assert.match(
    [...seenOutput()].find(([name]) => name === `${process.pid}.log`)?.[1] ?? "",
    /a harmless word/,
  );
  const forms = secretForms();
  for (const secret of Object.values(SECRETS)) {
    for (const user of ["u", "us", "use", USER]) {
      const encoded = Buffer.from(`${user}:${secret}`).toString("base64");
      assert.ok(
        forms.some((form) => encoded.includes(form)),
        `${user}:${secret}`,
      );
    }
  }
  assert.ok(forms.every((form) => form.length > 15));
});

test("temporary folders go when their test ends", () => {
  const cleanUps: (() => unknown)[] = [];
  const folder = temporaryFolder({ after: (cleanUp) => cleanUps.push(cleanUp) });
  writeFileSync(join(folder, "file"), "x");
  for (const cleanUp of cleanUps) cleanUp();
  assert.ok(!existsSync(folder));
});

// Which image of an index, what a manifest may say, and the library's methods for manifests.
import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import {
  type ErrorCode,
  ImgpullError,
  internals,
  Puller,
  type PullerOpts,
  type PullResult,
} from "../imgpull.ts";
import { runCommand, type TestScope, temporaryFolder } from "./support/command.ts";
import {
  digestOf,
  MEDIA,
  makeAttestation,
  makeHelmChart,
  makeImage,
  makeIndex,
  makeManifest,
  makeMultiPlatform,
  makeOrasArtifact,
  makeWasmArtifact,
  parsePlatform,
  readTar,
  type TestContent,
  type TestIndex,
} from "./support/image.ts";
import { assertFailed, resultOf, tryPull } from "./support/pull.ts";
import { type Registry, startRegistry } from "./support/registry.ts";

const { matchPlatform, parseManifest, parseReference, wantedPlatform, withSession, runPull } =
  internals;

const HOST = wantedPlatform({});
/** A processor that nobody runs these tests on. */
const OTHER = HOST.architecture === "s390x" ? "linux/riscv64" : "linux/s390x";

interface Pulled {
  result: PullResult | undefined;
  error: ImgpullError | undefined;
  warnings: string;
  registry: Registry;
  files: Map<string, Buffer>;
}

async function serve(t: TestScope, content: TestContent): Promise<Registry> {
  const registry = await startRegistry({}, t);
  registry.add(content, "team/app", "1.0");
  return registry;
}

function optsFor(registry: Registry, opts: Partial<PullerOpts>): PullerOpts {
  return { url: `${registry.host}/team/app:1.0`, scheme: "http", retries: 0, ...opts };
}

async function caught<T>(run: () => Promise<T>): Promise<{ result?: T; error?: ImgpullError }> {
  try {
    return { result: await run() };
  } catch (error) {
    if (!(error instanceof ImgpullError)) throw error;
    return { error };
  }
}

function filesOf(tar: Buffer): Map<string, Buffer> {
  const files = readTar(tar).filter(({ type }) => type === "0");
  return new Map(
    files.map(({ name, offset, size }) => [name, tar.subarray(offset, offset + size)]),
  );
}

/** After a failure nothing may be left: no pull here gets as far as a blob worth keeping. */
function leftIn(folder: string, isFailed: boolean): Map<string, Buffer> {
  assert.deepEqual(readdirSync(folder), isFailed ? [] : ["app.tar"]);
  return isFailed ? new Map() : filesOf(readFileSync(join(folder, "app.tar")));
}

async function pullFrom(
  t: TestScope,
  registry: Registry,
  opts: Partial<PullerOpts> = {},
): Promise<Pulled> {
  const folder = temporaryFolder(t);
  let warnings = "";
  const onWarning = (message: string) => {
    warnings += `${message}\n`;
  };
  const { result, error } = await caught(
    async () =>
      await new Puller({ ...optsFor(registry, opts), onWarning }).pullTar(join(folder, "app.tar")),
  );
  return { result, error, warnings, registry, files: leftIn(folder, error !== undefined) };
}

async function pull(
  t: TestScope,
  content: TestContent,
  opts: Partial<PullerOpts> = {},
): Promise<Pulled> {
  return await pullFrom(t, await serve(t, content), opts);
}

async function pullAll(t: TestScope, content: TestContent): Promise<Pulled> {
  const registry = await serve(t, content);
  const folder = temporaryFolder(t);
  const reference = parseReference(`${registry.host}/team/app:1.0`);
  const { result, error } = await caught(async () => {
    const images = [{ reference, name: "example.com/app:1.0" }];
    const request = { images, destination: join(folder, "app.tar"), choice: "all" as const };
    return await withSession(
      optsFor(registry, {}),
      async (session) => await runPull(session, request, () => {}),
    );
  });
  return {
    result: result && resultOf(result),
    error,
    warnings: "",
    registry,
    files: leftIn(folder, error !== undefined),
  };
}

function opted(platform: string): Partial<PullerOpts> {
  const { os, architecture, variant } = parsePlatform(platform);
  return { osType: os, archType: architecture, ...(variant !== undefined && { variant }) };
}

function jsonOf(files: Map<string, Buffer>, name: string) {
  return JSON.parse(String(files.get(name)));
}

const blobName = (digest: string) => `blobs/${digest.replace(":", "/")}`;

function assertRefused(
  { error, registry }: Pulled,
  code: ErrorCode,
  words: RegExp,
  name = "",
): void {
  assert.equal(error?.code, code, `${name}: ${error?.message}`);
  assert.match(error?.message ?? "", words, name);
  assert.equal(registry.blobRequests().length, 0, name);
}

// ====== Platforms ======

const MATCHES: [wanted: string, entries: string[], found: string | undefined][] = [
  ["linux/amd64", ["linux/arm64", "linux/amd64", "windows/amd64"], "linux/amd64"],
  ["linux/amd64", ["windows/amd64", "linux/arm64"], undefined],
  ["linux/amd64", ["linux/amd64/v3", "linux/amd64"], "linux/amd64"],
  ["linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"],
  ["linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], "linux/arm/v6"],
  ["linux/arm/v7", ["linux/arm/v5", "linux/arm64"], "linux/arm/v5"],
  ["linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], "linux/arm/v5"],
  ["linux/arm/v6", ["linux/arm/v7"], undefined],
  ["linux/arm/v5", ["linux/arm/v6", "linux/arm/v7"], undefined],
  ["linux/arm", ["linux/arm/v7", "linux/arm"], "linux/arm"],
  ["linux/arm", ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm/v7"],
  ["linux/arm64", ["linux/arm64/v8"], "linux/arm64/v8"],
  ["linux/arm64", ["linux/arm64/v8", "linux/arm64"], "linux/arm64"],
  ["linux/arm64/v8", ["linux/arm/v7", "linux/arm64"], "linux/arm64"],
  ["linux/arm64/v8", ["linux/arm64/v8", "linux/arm64"], "linux/arm64/v8"],
  ["linux/386", ["linux/amd64"], undefined],
  ["linux/arm/v4", ["linux/arm/v5", "linux/arm/v4"], "linux/arm/v4"],
  ["linux/arm/v4", ["linux/arm/v5", "linux/arm"], undefined],
  ["linux/arm64/v7", ["linux/arm64/v8", "linux/arm64/v7"], "linux/arm64/v7"],
  ["linux/amd64/v0", ["linux/amd64/v1", "linux/amd64/v0"], "linux/amd64/v0"],
  ["linux/arm/v07", ["linux/arm/v6", "linux/arm/v07"], "linux/arm/v07"],
];

test("os and processor, then the variant", () => {
  for (const [wanted, entries, found] of MATCHES) {
    const candidates = entries.map((entry) => ({
      mediaType: MEDIA.ociManifest,
      digest: digestOf(entry),
      size: 1,
      platform: parsePlatform(entry),
    }));
    const chosen = matchPlatform(candidates, parsePlatform(wanted));
    assert.equal(chosen?.digest, found && digestOf(found), `${wanted} of ${entries.join(" ")}`);
  }
});

test("the platform wanted by default is this machine's, in Go's names", () => {
  const names: [NodeJS.Platform, string, NodeJS.Architecture, string][] = [
    ["linux", "linux", "x64", "amd64"],
    ["linux", "linux", "arm64", "arm64"],
    ["win32", "windows", "ia32", "386"],
    ["darwin", "darwin", "x64", "amd64"],
    ["linux", "linux", "s390x", "s390x"],
    ["linux", "linux", "mipsel", "mipsle"],
  ];
  const { platform, arch } = process;
  try {
    for (const [nodeOs, os, nodeArch, architecture] of names) {
      Object.defineProperties(process, { platform: { value: nodeOs }, arch: { value: nodeArch } });
      const wanted = wantedPlatform({});
      assert.deepEqual([wanted.os, wanted.architecture], [os, architecture]);
    }
  } finally {
    Object.defineProperties(process, { platform: { value: platform }, arch: { value: arch } });
  }
  assert.deepEqual(wantedPlatform({ os: "plan9" }).os, "plan9");
  const asked = wantedPlatform({ architecture: "arm", variant: "v6" });
  assert.deepEqual([asked.architecture, asked.variant], ["arm", "v6"]);
});

const PLATFORMS = [
  "linux/amd64",
  "linux/arm64/v8",
  "linux/arm/v7",
  "linux/arm/v6",
  "windows/amd64",
];

test("Docker lists and OCI indexes, Docker and OCI manifests are one thing", async (t) => {
  const images = PLATFORMS.map((platform) =>
    makeImage({ platform, format: "docker", seed: platform }),
  );
  const indexes: [string, TestIndex][] = [
    ["oci", makeMultiPlatform(PLATFORMS, { format: "oci" })],
    ["docker", makeMultiPlatform(PLATFORMS, { format: "docker" })],
    ["docker in oci", makeIndex(images, { format: "oci" })],
  ];
  for (const [name, index] of indexes) {
    for (const [position, platform] of PLATFORMS.entries()) {
      const { result, files, registry } = await pull(t, index, opted(platform));
      const digest = index.children[position]?.digest ?? "";
      const got = [result?.digest, result?.platform, result?.layers];
      assert.deepEqual(got, [digest, platform, 2], `${name} ${platform}`);
      assert.equal(jsonOf(files, "index.json").manifests[0].digest, digest);
      assert.ok(!files.has(blobName(index.digest)), "the index is not in the tar of one platform");
      assert.equal(registry.manifestRequests().length, 2);
    }
  }
});

test("a platform that is not there: those that exist are said, attestations not among them", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm/v7"], { attestations: true });
  const pulled = await pull(t, index, opted("linux/riscv64"));
  assertRefused(pulled, "NO_PLATFORM", /linux\/riscv64/);
  assert.match(pulled.error?.message ?? "", /linux\/amd64.*linux\/arm\/v7/s);
  assert.doesNotMatch(pulled.error?.message ?? "", /unknown/);
  assert.ok((pulled.error?.message.split("\n").length ?? 0) <= 2);
});

test("attestations never match, not even by their name or alone", async (t) => {
  const image = makeImage({ platform: "linux/amd64" });
  const both = makeIndex([makeAttestation(image), image]);
  assertRefused(await pull(t, both, opted("unknown/unknown")), "NO_PLATFORM", /amd64/);
  const alone = makeIndex([makeAttestation(image)]);
  assertRefused(await pull(t, alone, opted("linux/amd64")), "NO_PLATFORM", /team\/app/);
  const { result } = await pull(t, both, opted("linux/amd64"));
  assert.equal(result?.digest, image.digest);
});

test("an entry without a platform matches if it is the only one", async (t) => {
  const image = makeImage({ platform: "linux/amd64" });
  const alone = await pull(
    t,
    makeIndex([{ content: image, platform: null }]),
    opted("linux/amd64"),
  );
  assert.equal(alone.result?.digest, image.digest);
  const attested = await pull(
    t,
    makeIndex([{ content: image, platform: null }, makeAttestation(image)]),
    opted("linux/amd64"),
  );
  assert.equal(attested.result?.digest, image.digest);
  const other = makeImage({ platform: "linux/arm64", seed: "other" });
  const two = makeIndex([
    { content: image, platform: null },
    { content: other, platform: null },
  ]);
  assertRefused(await pull(t, two, opted("linux/amd64")), "NO_PLATFORM", /linux\/amd64/);
});

test("an operating system not asked for and not in the index becomes linux, and a warning says so", async (t) => {
  const { platform } = process;
  Object.defineProperty(process, "platform", { value: "darwin" });
  t.after(() => Object.defineProperty(process, "platform", { value: platform }));
  const index = makeMultiPlatform(["linux/amd64", "windows/amd64"]);
  const { result, warnings } = await pull(t, index, { archType: "amd64" });
  assert.equal(result?.platform, "linux/amd64");
  assert.match(warnings, /darwin.*linux/s);
  assertRefused(await pull(t, index, opted("darwin/amd64")), "NO_PLATFORM", /darwin\/amd64/);
  const native = await pull(t, makeMultiPlatform(["linux/amd64", "darwin/amd64"]), {
    archType: "amd64",
  });
  assert.deepEqual([native.result?.platform, native.warnings], ["darwin/amd64", ""]);
});

test("one image for another platform: an error if that was asked for, a warning if not", async (t) => {
  const image = makeImage({ platform: OTHER });
  const asked = await pull(t, image, opted("linux/amd64"));
  assert.equal(asked.error?.code, "NO_PLATFORM");
  assert.match(asked.error?.message ?? "", new RegExp(`linux/amd64.*${OTHER}`, "s"));
  assert.equal(asked.registry.seen({ kind: "layer" }).length, 0);
  assert.equal((await pull(t, image, { osType: "windows" })).error?.code, "NO_PLATFORM");
  const byDefault = await pull(t, image);
  assert.deepEqual([byDefault.result?.digest, byDefault.result?.platform], [image.digest, OTHER]);
  assert.match(byDefault.warnings, new RegExp(OTHER));
  assert.equal((await pull(t, image, opted(OTHER))).warnings, "");
  const arm = makeImage({ platform: "linux/arm/v6" });
  assert.equal((await pull(t, arm, opted("linux/arm/v7"))).result?.platform, "linux/arm/v6");
  assert.equal((await pull(t, arm, opted("linux/arm/v5"))).error?.code, "NO_PLATFORM");
});

test("an entry with an empty platform matches if it is the only one, as if it had none", async (t) => {
  // project-zot/zui#475.
  const image = makeImage({ platform: "linux/amd64" });
  const other = makeImage({ platform: "linux/arm64", seed: "other" });
  for (const platform of [
    {},
    { os: "", architecture: "" },
    { os: "", architecture: "", variant: "" },
  ]) {
    const fields = { platform };
    const alone = makeIndex([{ content: image, fields }, makeAttestation(image)]);
    const pulled = await pull(t, alone, opted("linux/amd64"));
    assert.equal(pulled.result?.digest, image.digest);
    const two = makeIndex([
      { content: image, fields },
      { content: other, fields },
    ]);
    assertRefused(await pull(t, two, opted("linux/amd64")), "NO_PLATFORM", /`platforms` all/);
  }
});

// ====== Indexes in indexes ======

function nest(content: TestContent, times: number): TestContent {
  let nested = content;
  for (let level = 0; level < times; level += 1)
    nested = makeIndex([{ content: nested, platform: null }]);
  return nested;
}

test("an index inside an index is followed to depth 4 and no further", async (t) => {
  const image = makeImage({ platform: "linux/amd64" });
  for (const depth of [1, 2, 3, 4]) {
    const index = nest(makeIndex([image]), depth - 1);
    assert.equal(
      (await pull(t, index, opted("linux/amd64"))).result?.digest,
      image.digest,
      `depth ${depth}`,
    );
    const all = await pullAll(t, index);
    assert.equal(all.result?.digest, index.digest, `all, depth ${depth}`);
    for (const digest of index.manifests.keys())
      assert.ok(all.files.has(blobName(digest)), `all, depth ${depth}`);
  }
  const tooDeep = nest(makeIndex([image]), 4);
  assertRefused(await pull(t, tooDeep, opted("linux/amd64")), "TOO_LARGE", /deep/);
  assertRefused(await pullAll(t, tooDeep), "TOO_LARGE", /deep/);
});

test("a platform may be in the second of two nested indexes", async (t) => {
  const index = makeIndex([
    { content: makeMultiPlatform(["windows/amd64"]), platform: null },
    { content: makeMultiPlatform(["linux/amd64", "linux/arm64"]), platform: null },
  ]);
  const { result } = await pull(t, index, opted("linux/arm64"));
  assert.equal(result?.platform, "linux/arm64");
});

test("an index inside itself ends at once: its bytes are not those of the digest", async (t) => {
  for (const isAll of [false, true]) {
    const inner = makeIndex([makeImage()]);
    const outer = makeIndex([{ content: inner, platform: null }]);
    const registry = await serve(t, outer);
    const rule = registry.on({ kind: "manifest", tag: inner.digest }, { body: outer.bytes });
    const folder = temporaryFolder(t);
    const reference = parseReference(`${registry.host}/team/app:1.0`);
    const images = [{ reference, name: "example.com/app:1.0" }];
    const request = {
      images,
      destination: join(folder, "app.tar"),
      choice: isAll ? ("all" as const) : ("one" as const),
    };
    const { error } = await caught(
      async () =>
        await withSession(
          optsFor(registry, {}),
          async (session) => await runPull(session, request, () => {}),
        ),
    );
    assert.equal(error?.code, "DIGEST_MISMATCH");
    assert.ok(rule.hits > 0);
    assert.ok(registry.requests.length <= 3);
    leftIn(folder, true);
  }
});

// ====== Every platform ======

test("all keeps the index byte for byte, with every child and every blob", async (t) => {
  for (const format of ["oci", "docker"] as const) {
    const index = makeMultiPlatform(PLATFORMS, { format, attestations: format === "oci" });
    const { result, files } = await pullAll(t, index);
    assert.deepEqual([result?.digest, result?.platform], [index.digest, "all"]);
    const expected = new Map([...index.blobs].map(([digest, bytes]) => [blobName(digest), bytes]));
    for (const [digest, { bytes }] of index.manifests) expected.set(blobName(digest), bytes);
    const blobs = new Map([...files].filter(([name]) => name.startsWith("blobs/")));
    assert.deepEqual([...blobs.keys()].sort(), [...expected.keys()].sort());
    for (const [name, bytes] of expected) assert.ok(blobs.get(name)?.equals(bytes), name);
    const [entry, ...more] = jsonOf(files, "index.json").manifests;
    assert.deepEqual(
      [entry.digest, entry.mediaType, entry.size, more.length],
      [index.digest, index.mediaType, index.bytes.length, 0],
    );
  }
});

test("all: manifest.json has linux/amd64, else the first", async (t) => {
  const cases: [string[], string][] = [
    [["linux/arm64", "linux/amd64", "windows/amd64"], "linux/amd64"],
    [["linux/arm64", "linux/arm/v7"], "linux/arm64"],
  ];
  for (const [platforms, chosen] of cases) {
    const index = makeMultiPlatform(platforms, { attestations: true });
    const { files } = await pullAll(t, index);
    const entries = jsonOf(files, "manifest.json");
    const config = jsonOf(files, entries[0].Config);
    assert.deepEqual([entries.length, `${config.os}/${config.architecture}`], [1, chosen]);
    assert.deepEqual(entries[0].RepoTags, ["example.com/app:1.0"]);
  }
});

// ====== Not images ======

test("charts, WASM and ORAS artifacts are pulled as OCI content and left out of manifest.json", async (t) => {
  const artifacts: [string, TestContent][] = [
    ["chart", makeHelmChart()],
    ["oras", makeOrasArtifact()],
    ["wasm", makeWasmArtifact()],
  ];
  for (const [name, content] of artifacts) {
    for (const { result, files } of [await pull(t, content), await pullAll(t, content)]) {
      assert.equal(result?.digest, content.digest, name);
      assert.deepEqual(jsonOf(files, "manifest.json"), [], name);
      assert.equal(jsonOf(files, "index.json").manifests[0].digest, content.digest, name);
      for (const [digest, bytes] of content.blobs)
        assert.ok(files.get(blobName(digest))?.equals(bytes), name);
    }
  }
});

// ====== What is refused ======

test("schema 1 is refused by name", async (t) => {
  const schema1 = {
    schemaVersion: 1,
    name: "team/app",
    tag: "1.0",
    fsLayers: [],
    history: [],
    signatures: [],
  };
  for (const mediaType of [MEDIA.dockerSchema1, "application/json", "text/plain"]) {
    assertRefused(
      await pull(t, makeManifest(mediaType, schema1)),
      "UNSUPPORTED",
      /schema 1/,
      mediaType,
    );
  }
});

const good = makeImage();
const [layer] = good.manifest.layers;
const entry = { mediaType: MEDIA.ociManifest, digest: good.digest, size: good.bytes.length };

const BAD_DIGESTS: unknown[] = [
  "sha256:../../x",
  "sha256:",
  "",
  "../../etc/passwd",
  `sha256:${"0".repeat(63)}`,
  `sha256:${"0".repeat(65)}`,
  `sha256:${"A".repeat(64)}`,
  `sha256:${"0".repeat(62)}/.`,
  `sha256:${"0".repeat(64)}\n`,
  `sha512:${"0".repeat(64)}`,
  `md5:${"0".repeat(32)}`,
  `sha256:${"0".repeat(60)}%2f..`,
  12,
  null,
  ["sha256"],
  {},
];
const BAD_SIZES: unknown[] = [-1, "8192", 1.5, 2 ** 53, 1e300, true, null, [8192], {}, undefined];

test("digests and sizes that are none are refused, in configs, layers and indexes alike", () => {
  const parse = (mediaType: string, content: unknown) =>
    parseManifest(
      { mediaType, digest: good.digest, bytes: Buffer.from(JSON.stringify(content)) },
      "example",
    );
  assert.equal(parse(MEDIA.ociManifest, good.manifest).kind, "image");
  assert.equal(parse(MEDIA.ociIndex, { schemaVersion: 2, manifests: [entry] }).kind, "index");
  const fields = [
    ...BAD_DIGESTS.map((digest) => ({ digest })),
    ...BAD_SIZES.map((size) => ({ size })),
  ];
  for (const field of fields) {
    const places: [string, string, unknown][] = [
      [
        "config",
        MEDIA.ociManifest,
        { ...good.manifest, config: { ...good.manifest.config, ...field } },
      ],
      [
        "layer",
        MEDIA.dockerManifest,
        {
          ...good.manifest,
          mediaType: MEDIA.dockerManifest,
          layers: [layer, { ...layer, ...field }],
        },
      ],
      ["index", MEDIA.ociIndex, { schemaVersion: 2, manifests: [{ ...entry, ...field }] }],
    ];
    for (const [place, mediaType, content] of places) {
      assert.throws(
        () => parse(mediaType, content),
        (error) => {
          assert.ok(error instanceof ImgpullError, `${place} ${JSON.stringify(field)}`);
          assert.ok(["PROTOCOL", "TOO_LARGE"].includes(error.code));
          assert.doesNotMatch(error.message, /[^\P{Cc}\n]/u);
          return true;
        },
        `${place} ${JSON.stringify(field)}`,
      );
    }
  }
});

const NONSENSE: [name: string, mediaType: string, content: unknown][] = [
  ["not JSON", MEDIA.ociManifest, Buffer.from("{")],
  ["empty", MEDIA.ociManifest, Buffer.alloc(0)],
  ["a string", MEDIA.ociManifest, "manifest"],
  ["null", MEDIA.ociManifest, null],
  ["an array", MEDIA.ociIndex, [entry]],
  ["no config", MEDIA.ociManifest, { schemaVersion: 2, layers: [] }],
  ["layers that are no array", MEDIA.ociManifest, { ...good.manifest, layers: {} }],
  ["layers that are false", MEDIA.ociManifest, { ...good.manifest, layers: false }],
  ["layers that are a text", MEDIA.ociManifest, { ...good.manifest, layers: "" }],
  ["a layer that is null", MEDIA.ociManifest, { ...good.manifest, layers: [null] }],
  ["an entry that is a number", MEDIA.ociIndex, { schemaVersion: 2, manifests: [7] }],
  ["an image and an index in one", MEDIA.ociManifest, { ...good.manifest, manifests: [entry] }],
  [
    "an index that says image",
    MEDIA.ociManifest,
    { schemaVersion: 2, mediaType: MEDIA.ociManifest, manifests: [entry] },
  ],
  ["an image that says index", MEDIA.ociIndex, { ...good.manifest, mediaType: MEDIA.ociIndex }],
  [
    "an index under an image's Content-Type",
    MEDIA.ociManifest,
    { schemaVersion: 2, manifests: [entry] },
  ],
];

test("manifests that are none are refused before any blob is asked for", async (t) => {
  for (const [name, mediaType, content] of NONSENSE) {
    const pulled = await pull(t, makeManifest(mediaType, content), opted("linux/amd64"));
    assertRefused(pulled, "PROTOCOL", /team\/app/, name);
    assert.ok((pulled.error?.message.split("\n").length ?? 0) <= 2, name);
  }
});

test("a manifest of 50 MB is refused by name, and not read to its end", async (t) => {
  const huge = makeManifest(MEDIA.ociManifest, Buffer.alloc(50 * 1000 * 1000, " "));
  for (const contentLength of [undefined, "chunked", "close"] as const) {
    const registry = await serve(t, huge);
    const rule = registry.on(
      { kind: "manifest" },
      contentLength === undefined ? {} : { contentLength },
    );
    const { error } = await pullFrom(t, registry);
    assert.equal(error?.code, "TOO_LARGE");
    assert.match(error?.message ?? "", /manifest/);
    registry.disconnect();
    await registry.settled();
    assert.equal(rule.hits, 1);
    assert.ok(
      (registry.requests[0]?.bytesSent ?? Infinity) < 30e6,
      `sent ${registry.requests[0]?.bytesSent}`,
    );
  }
  const padded = makeImage({
    editManifest: (manifest) => {
      const text = JSON.stringify(manifest);
      return Buffer.from(text + " ".repeat(4 * 1024 * 1024 - text.length));
    },
  });
  assert.equal((await pull(t, padded)).result?.digest, padded.digest);
});

test("a config that is said to be larger than 16 MiB is not asked for", async (t) => {
  const image = makeImage({
    editManifest: (manifest) => ({
      ...manifest,
      config: { ...manifest.config, size: 16 * 1024 * 1024 + 1 },
    }),
  });
  assertRefused(await pull(t, image), "TOO_LARGE", /config/);
});

test("a manifest that is not as long as its index says", async (t) => {
  const index = makeIndex([{ content: good, fields: { size: good.bytes.length + 1 } }]);
  assertRefused(
    await pull(t, index, opted("linux/amd64")),
    "SIZE_MISMATCH",
    new RegExp(good.digest),
  );
});

test("a digest asked for is compared with the bytes, not with a header", async (t) => {
  const other = makeImage({ seed: "other" });
  const registry = await serve(t, good);
  const url = `${registry.host}/team/app@${good.digest}`;
  const lie = registry.on(
    { kind: "manifest" },
    { body: other.bytes, headers: { "docker-content-digest": good.digest } },
  );
  assert.equal((await pullFrom(t, registry, { url })).error?.code, "DIGEST_MISMATCH");
  assert.ok(lie.hits > 0);
  lie.remove();
  const wrongHeader = registry.on(
    { kind: "manifest" },
    { headers: { "docker-content-digest": other.digest } },
  );
  assert.equal((await pullFrom(t, registry, { url })).result?.digest, good.digest);
  assert.equal(wrongHeader.hits, 1);
});

test("a manifest or config whose bytes are wrong once is asked for once more", async (t) => {
  const clock = { now: () => 0, random: () => 0, sleep: async () => {} };
  for (const kind of ["manifest", "config"] as const) {
    const index = makeIndex([good]);
    const registry = await serve(t, kind === "manifest" ? index : good);
    const digest = kind === "manifest" ? good.digest : good.config.digest;
    const rule = registry.on({ kind, digest, times: 1 }, { corruptAt: 20 });
    const folder = temporaryFolder(t);
    const reference = parseReference(`${registry.host}/team/app:1.0`);
    const images = [{ reference, name: "example.com/app:1.0" }];
    const request = { images, destination: join(folder, "app.tar") };
    const opts = optsFor(registry, { ...opted("linux/amd64"), retries: 5 });
    const { error } = await caught(
      async () =>
        await withSession(opts, async (session) => await runPull(session, request, () => {}), {
          clock,
        }),
    );
    assert.equal(error?.message, undefined, kind);
    assert.equal(rule.hits, 1);
    leftIn(folder, false);
  }
});

// ====== Manifests that are not as one expects ======

test("no layers are told by an empty list, by null, or not at all", async (t) => {
  for (const layers of [[], null, undefined]) {
    for (const format of ["oci", "docker"] as const) {
      const image = makeImage({
        format,
        layers: [],
        editManifest: (manifest) => ({ ...manifest, layers }),
      });
      const { result, files } = await pull(t, image, opted("linux/amd64"));
      assert.deepEqual([result?.digest, result?.layers], [image.digest, 0]);
      assert.deepEqual(jsonOf(files, "manifest.json")[0].Layers, []);
    }
  }
});

test("an image whose config is not a JSON object is refused before any layer", async (t) => {
  for (const config of ["{", "", "null", "[]", '"config"', "42", "\0\0"]) {
    const image = makeImage({ editConfig: () => Buffer.from(config) });
    const { error, registry } = await pull(t, image, opted("linux/amd64"));
    assert.equal(error?.code, "PROTOCOL", config);
    assert.match(error?.message ?? "", /config is not a JSON object/);
    assert.equal(registry.seen({ kind: "layer" }).length, 0);
  }
});

test("an index whose image has such a config is refused when that has come, to whatever DEST", async (t) => {
  for (const config of ["{", "null", "[]", "\0\0"]) {
    const index = makeIndex([makeImage({ editConfig: () => Buffer.from(config) })]);
    for (const platforms of ["all", ["linux/amd64"]] as const) {
      for (const name of ["app.tar", "layout/"]) {
        const puller = new Puller(optsFor(await serve(t, index), { platforms }));
        const dest = `${temporaryFolder(t)}/${name}`;
        const { error } = await caught(() => puller.pullTar(dest));
        assert.equal(error?.code, "PROTOCOL", config);
        assert.match(error?.message ?? "", /config is not a JSON object/);
        assert.ok(
          !existsSync(join(dest, "index.json")) && (name !== "app.tar" || !existsSync(dest)),
        );
      }
    }
  }
  const index = makeIndex([makeImage({ editConfig: () => Buffer.from("{") })]);
  const registry = await serve(t, index);
  const args = [`${registry.host}/team/app:1.0`, "-", "--scheme", "http"];
  const { exitCode, stderr } = await runCommand([...args, "--platform", "linux/amd64"]);
  assert.equal(exitCode, 1);
  assert.match(stderr, /config is not a JSON object/);
});

/** What BuildKit's registry cache looks like: an index of layers and a config of its own. */
function makeCache(): TestContent {
  const [first, second] = makeImage({ seed: "cache", layers: [5000, 6000] }).layers;
  const config = Buffer.from('{"layers":[{"blob":"sha256:0","parent":-1}],"records":[]}');
  const entries = [
    ...[first, second].map((each) => ({ mediaType: MEDIA.ociGzip, ...each })),
    {
      mediaType: "application/vnd.buildkit.cacheconfig.v0",
      bytes: config,
      digest: digestOf(config),
    },
  ].map(({ mediaType, digest = "", bytes = Buffer.alloc(0) }) => ({ mediaType, digest, bytes }));
  const cache = makeManifest(MEDIA.ociIndex, {
    schemaVersion: 2,
    mediaType: MEDIA.ociIndex,
    manifests: entries.map(({ mediaType, digest, bytes }) => ({
      mediaType,
      digest,
      size: bytes.length,
    })),
  });
  for (const { digest, bytes } of entries) cache.blobs.set(digest, bytes);
  return cache;
}

test("BuildKit's cache: all takes its layers as blobs; for a platform there is nothing, which is said", async (t) => {
  // containers/image#2210.
  const cache = makeCache();
  const { result, files, registry } = await pullAll(t, cache);
  assert.equal(result?.digest, cache.digest);
  for (const [digest, bytes] of cache.blobs)
    assert.ok(files.get(blobName(digest))?.equals(bytes), digest);
  assert.deepEqual(jsonOf(files, "manifest.json"), []);
  assert.equal(registry.manifestRequests().length, 1);
  const tar = join(temporaryFolder(t), "cache.tar");
  const reference = `${registry.host}/team/app:1.0`;
  for (const args of [
    [reference, tar, "--scheme", "http", "--platform", "all"],
    ["--verify", tar],
  ]) {
    const { exitCode, stderr } = await runCommand(args);
    assert.equal(exitCode, 0, stderr);
  }

  const pulled = await pull(t, cache, opted("linux/amd64"));
  assertRefused(pulled, "NO_PLATFORM", /cache or artifacts: `platforms` all/);
  assert.equal(pulled.registry.requests.length, 1);
});

test("what has not one diff_id for each layer, or layers that are no tars, is content and no image", async (t) => {
  const image = makeImage();
  const artifacts = [
    makeImage({
      editConfig: (config) => ({ ...config, rootfs: { type: "layers", diff_ids: [] } }),
    }),
    makeImage({ editConfig: (config) => ({ ...config, rootfs: undefined }) }),
    makeImage({
      editManifest: (manifest) => ({
        ...manifest,
        layers: manifest.layers.map((each) => ({ ...each, mediaType: "application/vnd.x.model" })),
      }),
    }),
  ];
  for (const content of [image, ...artifacts]) {
    const { result, files } = await pull(t, content, opted("linux/amd64"));
    assert.equal(result?.digest, content.digest);
    assert.equal(jsonOf(files, "manifest.json").length, content === image ? 1 : 0);
    for (const digest of content.blobs.keys()) assert.ok(files.has(blobName(digest)));
  }
});

test("an image beside blobs in one index", async (t) => {
  const image = makeImage({ platform: "linux/amd64" });
  const [blob = ["", Buffer.alloc(0)]] = makeCache().blobs;
  const mixed = makeIndex([image], {
    editIndex: (json) => ({
      ...json,
      manifests: [
        { mediaType: MEDIA.ociGzip, digest: blob[0], size: blob[1].length },
        ...json.manifests,
      ],
    }),
  });
  mixed.blobs.set(...blob);
  assert.equal((await pull(t, mixed, opted("linux/amd64"))).result?.digest, image.digest);
  const { files } = await pullAll(t, mixed);
  for (const digest of [blob[0], image.digest, image.config.digest])
    assert.ok(files.has(blobName(digest)));
});

describe("content inside a descriptor", () => {
  const inline = (bytes: Buffer) => ({ data: bytes.toString("base64") });
  const plain = makeImage({ seed: "inline" });
  const withData = (descriptor: { digest: string }) => ({
    ...descriptor,
    ...inline(plain.blobs.get(descriptor.digest) ?? Buffer.alloc(0)),
  });
  const image = makeImage({
    seed: "inline",
    editManifest: (manifest) => ({
      ...manifest,
      config: withData(manifest.config),
      layers: manifest.layers.map(withData),
    }),
  });

  // containerd/containerd#8076: the blob is not there, or empty.
  for (const [name, blob] of [
    ["missing", undefined],
    ["empty", Buffer.alloc(0)],
  ] as const) {
    test(`is taken from there: the blob is ${name}`, async (t) => {
      const registry = await serve(t, image);
      for (const digest of image.blobs.keys()) {
        registry.remove("team/app", digest);
        if (blob) registry.putBlob("team/app", digest, blob);
      }
      const { result, files } = await pullFrom(t, registry, opted("linux/amd64"));
      assert.equal(result?.fetchedBytes, 0);
      for (const [digest, bytes] of image.blobs)
        assert.ok(files.get(blobName(digest))?.equals(bytes));
      assert.equal(registry.requests.length, 1);
    });
  }

  test("of an index: its manifest is not asked for", async (t) => {
    const index = makeIndex([{ content: good, fields: inline(good.bytes) }]);
    const registry = await serve(t, index);
    registry.remove("team/app", good.digest);
    const { result } = await pullFrom(t, registry, opted("linux/amd64"));
    assert.equal(result?.digest, good.digest);
  });

  test("that has not the digest is left alone", async (t) => {
    for (const data of ["", "e30=", inline(good.bytes).data, 12, null, "%%%"]) {
      const lying = makeImage({
        editManifest: (manifest) => ({
          ...manifest,
          config: { ...manifest.config, data },
          layers: manifest.layers.map((each) => ({ ...each, data })),
        }),
      });
      const { result, files } = await pull(t, lying, opted("linux/amd64"));
      assert.equal(result?.digest, lying.digest);
      for (const [digest, bytes] of lying.blobs)
        assert.ok(files.get(blobName(digest))?.equals(bytes));
    }
  });

  test("is among the blobs of a folder", async (t) => {
    const registry = await serve(t, image);
    for (const digest of image.blobs.keys()) registry.remove("team/app", digest);
    const puller = new Puller(optsFor(registry, opted("linux/amd64")));
    const folder = temporaryFolder(t);
    await puller.pullBlobs(await puller.getManifest(), folder);
    const names = [...image.blobs.keys()].map((digest) => digest.slice("sha256:".length));
    assert.deepEqual(readdirSync(folder).sort(), names.sort());
  });
});

test("each manifest is asked for once, however often it is named", async (t) => {
  const shared = makeImage({ platform: "linux/amd64" });
  const inner = makeIndex([shared]);
  const index = makeIndex([
    { content: inner, platform: null },
    { content: inner, platform: null },
    shared,
  ]);
  const all = await pullAll(t, index);
  assert.equal(all.result?.digest, index.digest);
  assert.equal(all.registry.manifestRequests().length, 3);
  const several = await pull(t, index, { platforms: ["linux/amd64", "linux/amd64"] });
  assert.equal(several.error, undefined);
  const digests = several.registry.manifestRequests().map(({ reference }) => reference);
  assert.equal(new Set(digests).size, digests.length);
});

// ====== The library's methods for manifests ======

test("pullManifest gives the index or the platform's manifest, byte for byte", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const registry = await serve(t, index);
  const puller = new Puller(optsFor(registry, opted("linux/arm64")));
  const list = await puller.pullManifest("list");
  assert.deepEqual(
    [list.mediaType, list.digest, list.imageUrl],
    [MEDIA.ociIndex, index.digest, puller.getUrl()],
  );
  assert.ok(index.bytes.equals(list.bytes));
  assert.deepEqual(list.manifest, index.index);
  const [, child] = index.children;
  const image = await puller.pullManifest("image");
  assert.deepEqual([image.mediaType, image.digest], [MEDIA.ociManifest, child?.digest]);
  assert.ok(child?.bytes.equals(image.bytes));
  await assert.rejects(puller.pullManifest("both" as "list"), { code: "BAD_OPTION" });
  assert.equal(registry.blobRequests().length, 0);

  const single = new Puller(optsFor(await serve(t, good), opted("linux/amd64")));
  assert.equal((await single.pullManifest("image")).digest, good.digest);
  await assert.rejects(single.pullManifest("list"), (error) => {
    assert.ok(error instanceof ImgpullError);
    assert.match(error.message, /list/);
    return true;
  });
});

test("getManifest gives whatever the registry has", async (t) => {
  for (const content of [good, makeMultiPlatform(["linux/amd64"]), makeHelmChart()]) {
    const registry = await serve(t, content);
    const { digest, mediaType, bytes } = await new Puller(optsFor(registry, {})).getManifest();
    assert.deepEqual([digest, mediaType], [content.digest, content.mediaType]);
    assert.ok(content.bytes.equals(bytes));
    assert.equal(registry.requests.length, 1);
  }
});

test("headManifest asks by HEAD, and by GET where the answer lacks something", async (t) => {
  const registry = await serve(t, good);
  const puller = new Puller(optsFor(registry, {}));
  const expected = { mediaType: good.mediaType, digest: good.digest, size: good.bytes.length };
  assert.deepEqual(await puller.headManifest(), expected);
  assert.deepEqual(
    registry.requests.map(({ method }) => method),
    ["HEAD"],
  );
  for (const header of ["docker-content-digest", "content-length", "content-type"]) {
    const rule = registry.on({ kind: "manifest", method: "HEAD" }, { headers: { [header]: null } });
    assert.deepEqual(await puller.headManifest(), expected, header);
    assert.equal(rule.hits, 1);
    rule.remove();
  }
  registry.remove("team/app", "1.0");
  await assert.rejects(puller.headManifest(), { code: "NOT_FOUND", status: 404 });
});

const IMAGE = makeImage();

test("sizes and digests nested deeper than a stack are refused in words", async (t) => {
  const registry = await startRegistry({}, t);
  const deep = `${"[".repeat(1_500_000)}${"]".repeat(1_500_000)}`;
  const bytes = Buffer.from(`{"schemaVersion":2,"config":{"digest":${deep}},"layers":[]}`);
  registry.on({ kind: "manifest" }, { body: bytes, status: 200 });
  const reference = registry.add(IMAGE, "team/app", "1.0");
  assertFailed(await tryPull(t, reference, { scheme: "http" }), "PROTOCOL", "an object");
});

// The tar that is written: its headers against those of GNU tar, the plan of one larger than any
// disk here, the bytes of real pulls, and the reader for tars that other programs made.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  closeSync,
  ftruncateSync,
  linkSync,
  mkdirSync,
  openSync,
  readFileSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { open } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";
import { ImgpullError, internals } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import { runCommand, SECRETS, type TestScope, temporaryFolder, USER } from "./support/command.ts";
import {
  digestOf,
  type Format,
  MEDIA,
  makeArtifact,
  makeImage,
  makeLayer,
  makeMultiPlatform,
  readTar,
  type TestContent,
  type TestImage,
  writeTar,
} from "./support/image.ts";
import { type MainResult, runMain } from "./support/main.ts";
import { type Registry, startRegistry } from "./support/registry.ts";

const { encodeTarHeader, planTar } = internals;

const isGnuTar = /GNU tar/.test(String(spawnSync("tar", ["--version"]).stdout));
const needsGnuTar = { skip: !isGnuTar && "GNU tar is not here" };
const GIB = 2 ** 30;

function gnuTar(folder: string, args: string[]): Buffer {
  const { status, stdout, stderr } = spawnSync("tar", args, {
    cwd: folder,
    maxBuffer: 64 * 1024 * 1024,
  });
  assert.equal(status, 0, String(stderr));
  return stdout;
}

const OWNED_BY_NOBODY = ["--owner=0", "--group=0", "--numeric-owner", "--mode=0644", "--mtime=@0"];
const PAX = [
  "--format=pax",
  "--pax-option=exthdr.name=PaxHeaders/blob,exthdr.mtime=0,delete=atime,delete=ctime," +
    "delete=mtime",
];

// ====== Headers ======

const sha256Name = `blobs/sha256/${"a".repeat(64)}`;
const sha512Name = `blobs/sha512/${"b".repeat(128)}`;

/** What GNU tar puts before a (sparse) file's content: for pax an extended header too. */
function gnuHeader(folder: string, name: string, sizeBytes: number, format: string[]): Buffer {
  mkdirSync(join(folder, "blobs/sha256"), { recursive: true });
  mkdirSync(join(folder, "blobs/sha512"), { recursive: true });
  writeFileSync(join(folder, name), "");
  truncateSync(join(folder, name), sizeBytes);
  const words = ["tar", ...OWNED_BY_NOBODY, ...format, "-cf", "-", name].join(" ");
  const { stdout } = spawnSync("sh", ["-c", `${words} | head -c 1536`], { cwd: folder });
  return stdout.subarray(0, stdout[156] === "x".charCodeAt(0) ? 1536 : 512);
}

/**
 * POSIX leaves the device numbers of what is no device open: GNU writes zeros into pax headers, we
 * write "0000000".
 */
function withoutDeviceNumbers(header: Buffer): Buffer {
  const copy = Buffer.from(header);
  if (copy[156] !== "x".charCodeAt(0)) return copy;
  copy.fill(0, 148, 156).fill(0, 329, 345);
  return copy;
}

test("headers are those of GNU tar, byte for byte", needsGnuTar, (t) => {
  const folder = temporaryFolder(t);
  const plain: [string, number][] = [
    ["oci-layout", 30],
    ["index.json", 0],
    [sha256Name, 1],
    [sha256Name, 2 ** 31 - 1],
    [sha256Name, 2 ** 31],
    [sha256Name, 2 ** 32 + 1],
    [sha256Name, 8 * GIB - 1],
    ["n".repeat(100), 512],
  ];
  for (const [name, sizeBytes] of plain) {
    const header = encodeTarHeader(name, sizeBytes);
    assert.equal(header.length, 512);
    assert.ok(
      header.equals(gnuHeader(folder, name, sizeBytes, ["--format=ustar"])),
      `${name} ${sizeBytes}`,
    );
  }
  const extended: [string, number][] = [
    [sha256Name, 8 * GIB],
    [sha256Name, 9_999_999_999],
    [sha256Name, 2 ** 40],
    [sha512Name, 5],
    [sha512Name, 8 * GIB],
    ["n".repeat(101), 0],
  ];
  for (const [name, sizeBytes] of extended) {
    const header = encodeTarHeader(name, sizeBytes);
    assert.equal(header.length, 1536);
    const theirs = gnuHeader(folder, name, sizeBytes, PAX);
    assert.ok(
      withoutDeviceNumbers(header).equals(withoutDeviceNumbers(theirs)),
      `${name} ${sizeBytes}`,
    );
    const [entry] = readTar(Buffer.concat([encodeTarHeader(name, 0), Buffer.alloc(1024)]));
    assert.equal(entry?.name, name);
  }
});

test("so are those of folders", needsGnuTar, (t) => {
  const folder = temporaryFolder(t);
  mkdirSync(join(folder, "blobs/sha256"), { recursive: true });
  for (const name of ["blobs/", "blobs/sha256/"]) {
    const words = [...OWNED_BY_NOBODY, "--mode=0755", "--format=ustar", "--no-recursion"];
    const theirs = gnuTar(folder, ["-cf", "-", ...words, name]).subarray(0, 512);
    assert.ok(encodeTarHeader(name, 0).equals(theirs), name);
  }
});

test("checksums hold and PAX records count themselves, at every length", () => {
  for (let length = 98; length < 1100; length += 1) {
    const name = "n".repeat(length);
    const tar = Buffer.concat([
      encodeTarHeader(name, 3),
      Buffer.from("abc"),
      Buffer.alloc(509 + 1024),
    ]);
    const entries = readTar(tar);
    assert.deepEqual(
      entries.map((entry) => [entry.name, entry.size]),
      [[name, 3]],
    );
    assert.equal(entries[0]?.pax.size, length > 100 ? 1 : 0);
  }
});

// ====== The plan ======

type Planned = Parameters<typeof planTar>[0][number];

/** An image that nobody has: its layers have digests and sizes, but no bytes. */
function imaginary(sizes: number[], algorithm: "sha256" | "sha512" = "sha256"): Planned {
  const layers = sizes.map((size, position) => ({
    mediaType: MEDIA.ociGzip,
    digest: digestOf(`layer ${position} of ${size}`, algorithm),
    size,
  }));
  const { config, bytes, digest, mediaType } = makeImage({
    editManifest: (manifest) => ({ ...manifest, layers }),
  });
  const top = { mediaType, digest, bytes };
  const content = { digest, manifest: { kind: "image", config, layers } };
  return {
    reference: internals.parseReference("example.com/app:1"),
    name: "example.com/app:1",
    top,
    manifests: [top],
    contents: [content],
    platform: "linux/amd64",
    registry: undefined,
  } as unknown as Planned;
}

const HUGE = [
  2 ** 31 - 1,
  2 ** 31,
  2 ** 31 + 1,
  2 ** 32 - 1,
  2 ** 32,
  2 ** 32 + 511,
  8 * GIB - 1,
  8 * GIB,
  8 * GIB + 1,
  9 * GIB + 513,
];

test("a plan is right beyond 2^31, 2^32 and 8 GiB, to the byte", () => {
  const plan = planTar([imaginary([...HUGE, 2 ** 40 + 1, 2 ** 50 + 3])]);
  let expected = 0n;
  for (const { name, sizeBytes, lead, offset } of plan.entries) {
    const padding = (512n - (expected % 512n)) % 512n;
    const headerBytes = BigInt(encodeTarHeader(name, sizeBytes).length);
    assert.equal(BigInt(lead.length), padding + headerBytes, name);
    expected += padding + headerBytes;
    assert.equal(BigInt(offset), expected, name);
    expected += BigInt(sizeBytes);
  }
  const end = ((expected + 511n) / 512n) * 512n + 1024n;
  assert.equal(BigInt(plan.sizeBytes), end);
  assert.equal(BigInt(plan.sizeBytes - plan.trailer.length), expected);
  assert.equal(
    plan.blobBytes,
    [...HUGE, 2 ** 40 + 1, 2 ** 50 + 3].reduce((sum, size) => sum + size, 0) +
      makeImage().config.size,
  );
});

/** The plan as a file in which the blobs are holes. */
function writeHollow(file: string, plan: ReturnType<typeof planTar>): void {
  const handle = openSync(file, "w");
  for (const { lead, offset, bytes } of plan.entries) {
    writeSync(handle, lead, 0, lead.length, offset - lead.length);
    if (bytes) writeSync(handle, bytes, 0, bytes.length, offset);
  }
  ftruncateSync(handle, plan.sizeBytes);
  closeSync(handle);
}

test(
  "GNU tar and our own reader list such a tar, with every entry at its place",
  needsGnuTar,
  async (t) => {
    const folder = temporaryFolder(t);
    for (const algorithm of ["sha256", "sha512"] as const) {
      const plan = planTar([imaginary(HUGE, algorithm)]);
      const file = join(folder, "huge.tar");
      writeHollow(file, plan);
      const listed = String(gnuTar(folder, ["--numeric-owner", "-R", "-tvf", file]))
        .trimEnd()
        .split("\n");
      const ending = listed.pop() ?? "";
      assert.match(ending, /NUL/);
      const entries = listed.map((line) =>
        /^block (\d+): (\S+) 0\/0 +(\d+) 1970-01-01 00:00 (.+)$/.exec(line)?.slice(1),
      );
      assert.deepEqual(
        entries,
        plan.entries.map(({ name, sizeBytes, offset }) => [
          String(offset / 512 - 1),
          name.endsWith("/") ? "drwxr-xr-x" : "-rw-r--r--",
          String(sizeBytes),
          name,
        ]),
      );
      const read = (await readFileTar(file)).map(({ name, sizeBytes, offset }) => ({
        name,
        sizeBytes,
        offset,
      }));
      assert.deepEqual(
        read,
        plan.entries.map(({ name, sizeBytes, offset }) => ({
          name: name.replace(/\/$/, ""),
          sizeBytes,
          offset,
        })),
      );
    }
  },
);

test("one digest with two sizes is refused", () => {
  const twice = imaginary([4096, 4097]);
  const [first, second] = twice.contents[0]?.manifest.layers ?? [];
  assert.ok(first && second);
  second.digest = first.digest;
  assert.throws(() => planTar([twice]), { code: "SIZE_MISMATCH" });
});

// ====== Tars that were pulled ======

interface PulledTar extends MainResult {
  tar: Buffer;
}

async function pullWith(args: string[], folder: string): Promise<PulledTar> {
  const dest = join(folder, "app.tar");
  const result = await runMain([
    "--scheme",
    "http",
    "--platform",
    "linux/amd64",
    "-q",
    ...args,
    dest,
  ]);
  assert.equal(result.exitCode, 0, result.stderr);
  return { ...result, tar: readFileSync(dest) };
}

async function serve(t: TestScope, images: Record<string, TestContent>): Promise<Registry> {
  const registry = await startRegistry({}, t);
  for (const [tag, content] of Object.entries(images)) registry.add(content, "team/app", tag);
  return registry;
}

const blobName = (digest: string) => `blobs/${digest.replace(":", "/")}`;

function filesOf(tar: Buffer): Map<string, Buffer> {
  const files = readTar(tar).filter(({ type }) => type === "0");
  return new Map(
    files.map(({ name, offset, size }) => [name, tar.subarray(offset, offset + size)]),
  );
}

const jsonOf = (files: Map<string, Buffer>, name: string) => JSON.parse(String(files.get(name)));

/**
 * Every descriptor reachable from index.json is in the tar with its size and digest, and
 * manifest.json's files too.
 */
function assertClosed(files: Map<string, Buffer>): void {
  const visit = (descriptor: { digest: string; size: number; mediaType: string }): void => {
    const bytes = files.get(blobName(descriptor.digest));
    assert.ok(bytes, `${descriptor.digest} is referenced and missing`);
    assert.equal(bytes.length, descriptor.size);
    assert.equal(
      digestOf(bytes, descriptor.digest.startsWith("sha512") ? "sha512" : "sha256"),
      descriptor.digest,
    );
    if (!/manifest|index/.test(descriptor.mediaType)) return;
    const { manifests = [], config = [], layers = [] } = JSON.parse(String(bytes));
    for (const child of [manifests, config, layers].flat()) visit(child);
  };
  for (const entry of jsonOf(files, "index.json").manifests) visit(entry);
  for (const { Config, Layers } of jsonOf(files, "manifest.json")) {
    for (const name of [Config, ...Layers])
      assert.ok(files.has(name), `${name} of manifest.json is missing`);
  }
}

const sizes = [4096, 4097, 8191, 200_003];

for (const format of ["oci", "docker"] as Format[]) {
  test(`an image with ${format} manifests: entries, their order, modes, owners and times`, async (t) => {
    const image = makeImage({ format, layers: sizes, seed: `layout-${format}` });
    const registry = await serve(t, { "1.0": image });
    const { tar, stdout } = await pullWith([`${registry.host}/team/app:1.0`], temporaryFolder(t));
    assert.equal(String(stdout), `${registry.host}/team/app:1.0@${image.digest}\n`);
    const entries = readTar(tar);
    assert.deepEqual(entries.map(({ name }) => name).slice(0, 5), [
      "blobs/",
      "blobs/sha256/",
      "oci-layout",
      "index.json",
      "manifest.json",
    ]);
    const blobs = [image.digest, image.config.digest, ...image.layers.map(({ digest }) => digest)];
    assert.deepEqual(
      entries
        .slice(5)
        .map(({ name }) => name)
        .sort(),
      blobs.map(blobName).sort(),
    );
    for (const { name, type, mode, uid, gid, mtime, headerOffset, pax } of entries) {
      assert.deepEqual(
        { type, mode, uid, gid, mtime },
        name.endsWith("/")
          ? { type: "5", mode: 0o755, uid: 0, gid: 0, mtime: 0 }
          : { type: "0", mode: 0o644, uid: 0, gid: 0, mtime: 0 },
        name,
      );
      assert.equal(pax.size, 0, name);
      assert.ok(
        tar.subarray(headerOffset + 265, headerOffset + 329).every((byte) => byte === 0),
        "no user, no group",
      );
    }
    const last = entries.at(-1);
    assert.equal(
      tar.length,
      Math.ceil(((last?.offset ?? 0) + (last?.size ?? 0)) / 512) * 512 + 1024,
    );
    const files = filesOf(tar);
    assertClosed(files);
    for (const [digest, bytes] of image.blobs)
      assert.ok(files.get(blobName(digest))?.equals(bytes));
    assert.ok(files.get(blobName(image.digest))?.equals(image.bytes));
  });
}

test("what oci-layout, index.json and manifest.json say, by tag and by digest", async (t) => {
  const image = makeImage({ format: "docker" });
  const registry = await serve(t, { "1.0": image });
  const named = `${registry.host}/team/app`;
  const cases: [string, string[], string, string[]][] = [
    [`${named}:1.0`, [], `${named}:1.0`, [`${named}:1.0`]],
    [`${named}@${image.digest}`, [], `${named}@${image.digest}`, []],
    [`${named}:1.0@${image.digest}`, [], `${named}:1.0`, [`${named}:1.0`]],
    [
      `${named}:1.0`,
      ["--name", "alpine:3.22"],
      "docker.io/library/alpine:3.22",
      ["docker.io/library/alpine:3.22"],
    ],
    [`${named}:1.0`, ["--ns", "quay.io"], "quay.io/team/app:1.0", ["quay.io/team/app:1.0"]],
  ];
  for (const [reference, options, name, tags] of cases) {
    const files = filesOf((await pullWith([reference, ...options], temporaryFolder(t))).tar);
    assert.deepEqual(jsonOf(files, "oci-layout"), { imageLayoutVersion: "1.0.0" });
    const {
      schemaVersion,
      manifests: [entry, ...more],
    } = jsonOf(files, "index.json");
    assert.deepEqual([schemaVersion, more.length], [2, 0]);
    const { mediaType, digest, size, annotations } = entry;
    assert.deepEqual(
      [mediaType, digest, size],
      [MEDIA.dockerManifest, image.digest, image.bytes.length],
    );
    assert.deepEqual(
      annotations,
      { "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name },
      reference,
    );
    assert.deepEqual(
      jsonOf(files, "manifest.json"),
      [
        {
          Config: blobName(image.config.digest),
          RepoTags: tags,
          Layers: image.layers.map((layer) => blobName(layer.digest)),
        },
      ],
      reference,
    );
  }
});

test("GNU tar lists and extracts our tar", needsGnuTar, async (t) => {
  const image = makeImage({ algorithm: "sha512", layers: sizes, seed: "extracted" });
  const registry = await serve(t, { "1.0": image });
  const folder = temporaryFolder(t);
  const { tar } = await pullWith([`${registry.host}/team/app:1.0`], folder);
  const names = String(gnuTar(folder, ["-tf", "app.tar"]))
    .trimEnd()
    .split("\n");
  assert.deepEqual(
    names,
    readTar(tar).map(({ name }) => name),
  );
  assert.ok(names.some((name) => name.length > 100));
  mkdirSync(join(folder, "out"));
  gnuTar(folder, ["-xf", "app.tar", "-C", "out"]);
  for (const [name, bytes] of filesOf(tar))
    assert.ok(readFileSync(join(folder, "out", name)).equals(bytes), name);
  for (const [digest, bytes] of image.blobs) {
    assert.ok(readFileSync(join(folder, "out", blobName(digest))).equals(bytes), digest);
  }
});

test("two pulls of one image are byte-identical, on another machine, by one connection, to stdout", async (t) => {
  const image = makeImage({ layers: [300_000, 100_000, 4096], seed: "twice" });
  const registry = await serve(t, { "1.0": image });
  const reference = `${registry.host}/team/app:1.0`;
  const { tar } = await pullWith([reference], temporaryFolder(t));
  const again = await pullWith([reference, "-j", "1"], temporaryFolder(t));
  assert.ok(again.tar.equals(tar));
  const last = registry.on(
    { kind: "layer", digest: image.layers[0]?.digest ?? "" },
    {
      wait: registry.arrived({ kind: "layer", digest: image.layers[2]?.digest ?? "" }, 3),
    },
  );
  const late = await pullWith([reference], temporaryFolder(t));
  assert.equal(last.hits, 1);
  last.remove();
  assert.ok(late.tar.equals(tar));
  const cwd = temporaryFolder(t);
  const env = {
    TZ: "Pacific/Auckland",
    LANG: "tr_TR.UTF-8",
    LC_ALL: "tr_TR.UTF-8",
    HOME: cwd,
    USER: "someone",
  };
  const args = [reference, "-", "--scheme", "http", "--platform", "linux/amd64"];
  const elsewhere = await runCommand(args, { cwd, env });
  assert.equal(elsewhere.exitCode, 0, elsewhere.stderr);
  assert.ok(elsewhere.stdout.equals(tar));
});

test("two registries, one name: the same bytes", async (t) => {
  const image = makeImage({ seed: "mirrored" });
  const tars = [];
  for (let round = 0; round < 2; round += 1) {
    const registry = await serve(t, { "1.0": image });
    tars.push(
      (await pullWith([`${registry.host}/team/app:1.0`, "-n", "quay.io"], temporaryFolder(t))).tar,
    );
  }
  assert.ok(tars[0]?.equals(tars[1] ?? Buffer.alloc(0)));
});

test("several images: in the order given, each blob once", async (t) => {
  const base = makeLayer({ seed: "base", sizeBytes: 50_000 });
  const images: Record<string, TestImage> = {
    one: makeImage({ seed: "one", layers: [base, 4096] }),
    two: makeImage({ seed: "two", layers: [base, 5000] }),
  };
  const registry = await serve(t, { ...images, same: images.one as TestImage });
  const named = (tag: string) => `${registry.host}/team/app:${tag}`;
  for (const order of [
    ["one", "two", "same"],
    ["two", "same", "one"],
  ]) {
    registry.forget();
    const { tar, stdout } = await pullWith(order.map(named), temporaryFolder(t));
    const digests = order.map((tag) => images[tag === "same" ? "one" : tag]?.digest);
    assert.equal(String(stdout), order.map((tag, at) => `${named(tag)}@${digests[at]}\n`).join(""));
    const names = readTar(tar).map(({ name }) => name);
    assert.equal(new Set(names).size, names.length);
    const files = filesOf(tar);
    assertClosed(files);
    const { manifests } = jsonOf(files, "index.json");
    assert.deepEqual(
      manifests.map((entry: { digest: string }) => entry.digest),
      digests,
    );
    const tags = jsonOf(files, "manifest.json").flatMap(
      (entry: { RepoTags: string[] }) => entry.RepoTags,
    );
    assert.deepEqual(tags, order.map(named));
    assert.equal(registry.bytesServed(base.digest), base.bytes.length);
  }
});

test("a layer that is there twice, one without bytes, and none at all", async (t) => {
  const layer = makeLayer({ seed: "double" });
  const registry = await serve(t, {
    double: makeImage({ layers: [layer, 4096, layer] }),
    none: makeImage({ layers: [], seed: "none" }),
    empty: makeArtifact({ layers: [{ mediaType: "text/plain", bytes: Buffer.alloc(0) }] }),
  });
  for (const tag of ["double", "none", "empty"]) {
    const files = filesOf(
      (await pullWith([`${registry.host}/team/app:${tag}`], temporaryFolder(t))).tar,
    );
    assertClosed(files);
    const [entry] = jsonOf(files, "manifest.json");
    const layersOf: Record<string, number> = { double: 3, none: 0 };
    assert.equal(entry?.Layers.length, layersOf[tag]);
  }
  assert.equal(registry.bytesServed(layer.digest), layer.bytes.length);
});

test("zstd layers: a warning says which loaders will not take them", async (t) => {
  for (const format of ["oci", "docker"] as Format[]) {
    const image = makeImage({ format, layers: [{ compression: "zstd" }, 4096] });
    const registry = await serve(t, { "1.0": image });
    const { tar, stderr } = await pullWith([`${registry.host}/team/app:1.0`], temporaryFolder(t));
    assert.match(stderr, /zstd.*Docker before 23/);
    assertClosed(filesOf(tar));
  }
  const registry = await serve(t, { "1.0": makeImage() });
  assert.equal((await pullWith([`${registry.host}/team/app:1.0`], temporaryFolder(t))).stderr, "");
});

test("foreign layers: from the registry; only if it has none from urls, by https, without a credential", async (t) => {
  const authority = makeAuthority();
  const folder = temporaryFolder(t);
  writeFileSync(join(folder, "ca.pem"), authority.cert);
  const elsewhere = await startRegistry({ tls: authority.issueServer() }, t);
  const registry = await startRegistry({ auth: "basic" }, t);
  const bytes = makeLayer({ seed: "foreign", sizeBytes: 20_000 });
  const blobUrl = (scheme: string) =>
    `${scheme}://${elsewhere.host}/v2/files/blobs/${bytes.digest}`;
  const layered = (urls: string[]) =>
    makeImage({ layers: [4096, { seed: "foreign", sizeBytes: 20_000, urls }] });
  elsewhere.add(layered([]), "files");
  const credentials = [
    "-u",
    USER,
    "-p",
    SECRETS.password,
    "--retries",
    "0",
    "--ca",
    join(folder, "ca.pem"),
  ];
  const pull = async (tag: string) =>
    await runMain([
      `${registry.host}/team/app:${tag}`,
      "-s",
      "http",
      "-q",
      "--platform",
      "linux/amd64",
      ...credentials,
      join(temporaryFolder(t), "app.tar"),
    ]);

  const image = layered([blobUrl("http"), blobUrl("https")]);
  registry.add(image, "team/app", "held");
  const held = await pull("held");
  assert.deepEqual([held.exitCode, elsewhere.requests.length], [0, 0], held.stderr);
  assert.match(held.stderr, /foreign layers.*Docker/);

  registry.remove("team/app", bytes.digest);
  const fetched = await pull("held");
  assert.equal(fetched.exitCode, 0, fetched.stderr);
  const [request, ...more] = elsewhere.requests;
  assert.deepEqual(
    [request?.path, request?.headers.authorization, more.length],
    [`/v2/files/blobs/${bytes.digest}`, undefined, 0],
  );

  registry.add(layered([blobUrl("http")]), "team/app", "plain", { without: [bytes.digest] });
  const refused = await pull("plain");
  assert.deepEqual([refused.exitCode, elsewhere.requests.length], [1, 1], refused.stderr);
  assert.match(refused.stderr, new RegExp(bytes.digest.slice(0, 20)));
});

test("every platform: the tar of the whole index, the same each time", async (t) => {
  const index = makeMultiPlatform(["linux/arm64", "linux/amd64"], { attestations: true });
  const registry = await serve(t, { "1.0": index });
  const tars = [];
  for (let round = 0; round < 2; round += 1) {
    const dest = join(temporaryFolder(t), "all.tar");
    const args = [`${registry.host}/team/app:1.0`, dest, "-s", "http", "--platform", "all", "-q"];
    const { exitCode, stdout, stderr } = await runMain(args);
    assert.equal(exitCode, 0, stderr);
    assert.equal(String(stdout), `${registry.host}/team/app:1.0@${index.digest}\n`);
    tars.push(readFileSync(dest));
  }
  assert.ok(tars[0]?.equals(tars[1] ?? Buffer.alloc(0)));
  assertClosed(filesOf(tars[0] ?? Buffer.alloc(0)));
});

// ====== Tars that others made ======

interface Read {
  name: string;
  sizeBytes: number;
  offset: number;
  type: string;
  linkName: string;
}

async function readFileTar(file: string): Promise<Read[]> {
  const handle = await open(file);
  try {
    const entries: Read[] = [];
    for await (const { name, sizeBytes, offset, type, linkName } of internals.readTar(
      handle,
      "some.tar",
    )) {
      entries.push({ name, sizeBytes, offset, type, linkName });
    }
    return entries;
  } finally {
    await handle.close();
  }
}

const longPath = `${"folder/".repeat(30)}file`;
const middlePath = `${"part/".repeat(22)}file`;

test(
  "tars by GNU tar in its formats, with long names and links, are read",
  needsGnuTar,
  async (t) => {
    const folder = temporaryFolder(t);
    const held: Record<string, string> = {
      short: "s",
      [middlePath]: "middle ".repeat(100),
      empty: "",
      ünïcode: "u",
    };
    const longer = { ...held, [longPath]: "long" };
    for (const [path, content] of Object.entries(longer)) {
      mkdirSync(join(folder, path, ".."), { recursive: true });
      writeFileSync(join(folder, path), content);
    }
    symlinkSync(longPath, join(folder, "symlink"));
    linkSync(join(folder, longPath), join(folder, "hardlink"));
    const cases: [string[], Record<string, string>][] = [
      [["--format=gnu"], longer],
      [["--format=pax"], longer],
      [["--format=oldgnu"], longer],
      [["--format=ustar"], held],
      [["--format=v7"], { short: "s", empty: "" }],
      [["--format=gnu", "--listed-incremental=snapshot"], longer],
      [["--format=pax", "--pax-option=globexthdr.name=global,comment:=imgpull"], longer],
    ];
    for (const [format, expected] of cases) {
      const isLong = longPath in expected;
      const names = [...Object.keys(expected), ...(isLong ? ["symlink", "hardlink"] : [])];
      gnuTar(folder, ["-cf", "made.tar", ...format, ...names.map((name) => `./${name}`)]);
      const tar = readFileSync(join(folder, "made.tar"));
      const entries = (await readFileTar(join(folder, "made.tar"))).filter(
        ({ type }) => type === "0",
      );
      assert.deepEqual(
        entries.map(({ name }) => name).sort(),
        Object.keys(expected).sort(),
        format.join(" "),
      );
      for (const { name, offset, sizeBytes } of entries) {
        assert.equal(
          String(tar.subarray(offset, offset + sizeBytes)),
          expected[name],
          `${format.join(" ")} ${name}`,
        );
      }
      const links = (await readFileTar(join(folder, "made.tar"))).filter(
        ({ type }) => type === "1" || type === "2",
      );
      assert.deepEqual(
        links.map(({ name, type, linkName }) => [name, type, linkName.replace("./", "")]).sort(),
        isLong
          ? [
              ["hardlink", "1", longPath],
              ["symlink", "2", longPath],
            ]
          : [],
        format.join(" "),
      );
    }
  },
);

test("sizes above 8 GiB in GNU's and in PAX's form are read", needsGnuTar, async (t) => {
  const folder = temporaryFolder(t);
  const size = 8 * GIB + 12_345;
  writeFileSync(join(folder, "large"), "");
  truncateSync(join(folder, "large"), size);
  for (const format of ["gnu", "pax"]) {
    const { stdout } = spawnSync(
      "sh",
      ["-c", `tar -cf - --format=${format} large | head -c 4096`],
      { cwd: folder },
    );
    const headerBytes = format === "gnu" ? 512 : 1536;
    const file = join(folder, "made.tar");
    const next = writeTar([["after", Buffer.from("the end")]]);
    const handle = openSync(file, "w");
    writeSync(handle, stdout, 0, headerBytes, 0);
    const position = headerBytes + Math.ceil(size / 512) * 512;
    writeSync(handle, next, 0, next.length, position);
    closeSync(handle);
    const entries = (await readFileTar(file)).map(({ name, sizeBytes, offset }) => ({
      name,
      sizeBytes,
      offset,
    }));
    assert.deepEqual(entries, [
      { name: "large", sizeBytes: size, offset: headerBytes },
      { name: "after", sizeBytes: 7, offset: position + 512 },
    ]);
  }
});

function paxRecord(key: string, value: string): string {
  const rest = ` ${key}=${value}\n`;
  const length = [1, 2, 3, 4, 5]
    .map((digits) => digits + Buffer.byteLength(rest))
    .find((total) => `${total}`.length + Buffer.byteLength(rest) === total);
  return `${length}${rest}`;
}

/** A tar with an extended header of the given type before its only file. */
function extended(
  type: string,
  records: string | Buffer,
  name = "file",
  content = "content",
): Buffer {
  const head = writeTar([["PaxHeaders/x", Buffer.from(records)]]);
  const header = retyped(head, type).subarray(0, head.length - 1024);
  return Buffer.concat([header, writeTar([[name, Buffer.from(content)]])]);
}

function withChecksum(tar: Buffer): Buffer {
  tar.fill(" ", 148, 156);
  const sum = tar.subarray(0, 512).reduce((total, byte) => total + byte, 0);
  tar.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148);
  return tar;
}

function retyped(tar: Buffer, type: string): Buffer {
  const copy = Buffer.from(tar);
  copy.write(type, 156);
  return withChecksum(copy);
}

test("PAX records: the next entry only, UTF-8, odd values, global ones", async (t) => {
  const file = join(temporaryFolder(t), "made.tar");
  const second = writeTar([["second", Buffer.from("2")]]);
  const cases: [name: string, tar: Buffer, names: string[]][] = [
    ["path", extended("x", paxRecord("path", "a=b\nc/ü")), ["a=b\nc/ü", "second"]],
    [
      "several",
      extended("x", paxRecord("mtime", "1.5") + paxRecord("path", "p") + paxRecord("comment", "c")),
      ["p", "second"],
    ],
    ["none", extended("x", ""), ["file", "second"]],
    ["global", extended("g", paxRecord("comment", "0123456789abcdef")), ["file", "second"]],
    ["GNU's long name", extended("L", "a/long/name\0"), ["a/long/name", "second"]],
    ["GNU's long link", extended("K", "a/long/name\0"), ["file", "second"]],
    ["./ before the name", writeTar([["./file", Buffer.from("1")]]), ["file", "second"]],
  ];
  for (const [name, tar, names] of cases) {
    writeFileSync(file, Buffer.concat([tar.subarray(0, tar.length - 1024), second]));
    assert.deepEqual(
      (await readFileTar(file)).map((entry) => entry.name),
      names,
      name,
    );
  }
  writeFileSync(file, extended("x", paxRecord("size", "3"), "file", "con"));
  assert.deepEqual(
    (await readFileTar(file)).map(({ sizeBytes }) => sizeBytes),
    [3],
  );
});

function changed(tar: Buffer, change: (header: Buffer) => void): Buffer {
  const copy = Buffer.from(tar);
  change(copy);
  return withChecksum(copy);
}

const one = writeTar([["file", Buffer.from("content")]]);
const DAMAGED: [name: string, bytes: Buffer][] = [
  ["a wrong checksum", Buffer.concat([Buffer.from("X"), one.subarray(1)])],
  ["gzip", Buffer.concat([Buffer.from([0x1f, 0x8b, 8, 0]), Buffer.alloc(2000, 7)])],
  ["a web page", Buffer.from(`<html>${"x".repeat(2000)}</html>`)],
  ["cut within a header", one.subarray(0, 300)],
  ["cut within the content", one.subarray(0, 515)],
  ["a negative size in base 256", changed(one, (header) => header.fill(0xff, 124, 136))],
  [
    "a size beyond 2^53",
    changed(one, (header) => header.fill(0x80, 124, 125).fill(0x11, 125, 136)),
  ],
  ["a size that is no number", changed(one, (header) => header.write("zzzzzzzzzzz\0", 124))],
  ["a PAX size that is no number", extended("x", paxRecord("size", "many"))],
  ["a negative PAX size", extended("x", paxRecord("size", "-1"))],
  ["a PAX size beyond the file", extended("x", paxRecord("size", "99999999999"))],
  ["an extended header of 17 MiB", extended("x", Buffer.alloc(17 * 1024 * 1024, "x"))],
  // What Go's archive/tar refuses, and with it every loader.
  ["a mode that is not octal", changed(one, (header) => header.write("0000648\0", 100))],
  ["an owner that is not octal", changed(one, (header) => header.write("00 0000\0", 108))],
  ["a time that is not octal", changed(one, (header) => header.write("1.5", 136))],
  ["a device number that is not octal", changed(one, (header) => header.write("x", 329))],
  ["a pax record without =", extended("x", "9 abcdef\n")],
  ["a pax record without a key", extended("x", "5 =a\n")],
  ["a pax record without a line end", extended("x", "8 a=bcd ")],
  ["a pax record that is longer than it says", extended("x", "6 a=bcd\n")],
  ["a pax record that is shorter than it says", extended("x", "60 a=bcd\n")],
  ["a malformed global pax record", extended("g", "nonsense\n")],
  ["a name with a NUL in pax", extended("x", paxRecord("path", "a\0b"))],
  ["an extended header of 2 MiB", extended("x", paxRecord("comment", "c".repeat(2 << 20)))],
  [
    "data after a block of zeros",
    Buffer.concat([one.subarray(0, 1024), Buffer.alloc(512), one.subarray(0, 1024)]),
  ],
];

test("names as loaders resolve them; two files of one name, and names through .. or a link, are refused", async (t) => {
  const file = join(temporaryFolder(t), "made.tar");
  const content = Buffer.from("content");
  const read = async (tar: Buffer) => {
    writeFileSync(file, tar);
    const { handle, names } = await internals.openTarFile(file);
    await handle.close();
    return [...names.entries.keys()];
  };
  for (const name of ["/a/b", "./a/b", "././a/b", ".//a/b", "a//b", "a/./b", "//a/b"])
    assert.deepEqual(await read(writeTar([[name, content]])), ["a/b"], name);

  const link = retyped(writeTar([["x", Buffer.alloc(0)]]), "2").subarray(0, 512);
  const refused: [why: RegExp, tar: Buffer][] = [
    ...["/a", "./a", ".//a", "././a", "a/", "a/."].map((name): [RegExp, Buffer] => [
      /two entries are called a$/,
      writeTar([
        ["a", content],
        [name, content],
      ]),
    ]),
    [/leads through \.\./, writeTar([["b/../a", content]])],
    [/leads through \.\./, writeTar([["../a", content]])],
    [
      /x\/a lies below something that is no folder/,
      Buffer.concat([link, writeTar([["x/a", content]])]),
    ],
    [
      /x\/y\/a lies below something that is no folder/,
      writeTar([
        ["x", content],
        ["x/y/a", content],
      ]),
    ],
    [
      /two entries are called x$/,
      Buffer.concat([writeTar([["x/a", content]]).subarray(0, 1024), link, Buffer.alloc(1024)]),
    ],
  ];
  for (const [why, tar] of refused) await assert.rejects(read(tar), why);
});

test("files with holes, in GNU's and in the three PAX forms", needsGnuTar, async (t) => {
  const folder = temporaryFolder(t);
  const file = openSync(join(folder, "holes"), "w");
  ftruncateSync(file, 9_000_000);
  for (let at = 0; at < 30; at += 1) writeSync(file, `piece ${at}`, 200_000 * at);
  closeSync(file);
  writeFileSync(join(folder, "after"), "after");
  const forms = [["gnu"], ["pax", "0.0"], ["pax", "0.1"], ["pax", "1.0"]];
  for (const [format, version] of forms) {
    const flags = [`--format=${format}`, ...(version ? [`--sparse-version=${version}`] : [])];
    gnuTar(folder, ["-cSf", "made.tar", ...flags, "holes", "after"]);
    const handle = await open(join(folder, "made.tar"));
    const entries = [];
    for await (const entry of internals.readTar(handle, "made.tar")) entries.push(entry);
    const [holed, after] = entries;
    assert.deepEqual(
      [holed?.name, after?.name, entries.length],
      ["holes", "after", 2],
      flags.join(),
    );
    assert.equal(holed?.holes?.realBytes, 9_000_000, flags.join());
    const [first] = holed?.holes?.pieces ?? [];
    const tar = readFileSync(join(folder, "made.tar"));
    assert.equal(first?.[0], 0);
    assert.equal(tar.toString("latin1", holed?.offset, (holed?.offset ?? 0) + 7), "piece 0");
    await handle.close();
  }
});

test("what is no tar, or a damaged one, is refused by name", async (t) => {
  const file = join(temporaryFolder(t), "made.tar");
  for (const [name, bytes] of DAMAGED) {
    writeFileSync(file, bytes);
    await assert.rejects(
      readFileTar(file),
      (error) => {
        assert.ok(error instanceof ImgpullError, `${name}: ${error}`);
        assert.equal(error.code, "BAD_TAR", name);
        assert.match(error.message, /some\.tar/, name);
        return true;
      },
      name,
    );
  }
});

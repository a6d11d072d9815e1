// Many images, whole indexes, artifacts, folders, streams, the library's other methods. SPEC §1, §3, §4, §5, §9.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { internals, type ManifestHolder, Puller, type PullerOpts } from "../imgpull.ts";
import {
  type CommandOptions,
  type CommandResult,
  cleanEnvironment,
  runCommand,
  startCommand,
  temporaryFolder,
} from "./support/command.ts";
import {
  type Algorithm,
  digestOf,
  makeHelmChart,
  makeImage,
  makeIndex,
  makeLayer,
  makeMultiPlatform,
  makeOrasArtifact,
  makeWasmArtifact,
  readTar,
  type TestContent,
  type TestImage,
} from "./support/image.ts";
import { runMain } from "./support/main.ts";
import {
  blobBytes,
  blobName,
  blobsOf,
  childOf,
  failure,
  filesOf,
  LINUX,
  makeFar,
} from "./support/pull.ts";
import {
  type Fault,
  gate,
  type Registry,
  type RegistryOptions,
  startRegistry,
} from "./support/registry.ts";

// Puller reads process.env: a developer's proxies and credentials must not count here.
process.env = cleanEnvironment();

const OPTIONS = ["--scheme", "http", "--platform", "linux/amd64"];
const MIB = 1024 * 1024;

async function succeed(args: string[], options: CommandOptions = {}): Promise<CommandResult> {
  const result = await runCommand(args, options);
  assert.equal(result.exitCode, 0, result.stderr);
  return result;
}

interface IndexEntry {
  mediaType: string;
  digest: string;
  size: number;
  annotations?: Record<string, string>;
}
interface DockerEntry {
  Config: string;
  RepoTags: string[];
  Layers: string[];
}

function indexEntries(files: Map<string, Buffer>): IndexEntry[] {
  return JSON.parse(String(files.get("index.json"))).manifests;
}

function refNames(entries: IndexEntry[]): (string | undefined)[] {
  return entries.map(({ annotations }) => annotations?.["org.opencontainers.image.ref.name"]);
}

function dockerEntries(files: Map<string, Buffer>): DockerEntry[] {
  return JSON.parse(String(files.get("manifest.json")));
}

function fetched(registry: Registry): (string | undefined)[] {
  return registry
    .blobRequests()
    .map(({ digest }) => digest)
    .sort();
}

// ====== Many images ======

const PLATFORMS = ["linux/arm64", "linux/amd64"];
const BASE = [makeLayer({ seed: "base-1", sizeBytes: 60_000 }), makeLayer({ seed: "base-2" })];
const FIRST = makeMultiPlatform(PLATFORMS, {
  seed: "first",
  layers: [...BASE, makeLayer({ seed: "first" })],
});
const SECOND = makeMultiPlatform(PLATFORMS, {
  seed: "second",
  layers: [...BASE, makeLayer({ seed: "second" })],
});
const THIRD = makeImage({ seed: "third", format: "docker", layers: [9000] });
const IMAGES = [childOf(FIRST, 1), childOf(SECOND, 1), THIRD];

interface Bundle {
  registry: Registry;
  folder: string;
  references: [string, string, string];
}

async function serveBundle(t: TestContext, options: RegistryOptions = {}): Promise<Bundle> {
  const registry = await startRegistry(options, t);
  const references: Bundle["references"] = [
    registry.add(FIRST, "team/first", "1.0"),
    registry.add(SECOND, "team/second", "2.0"),
    registry.add(THIRD, "third", "3"),
  ];
  return { registry, references, folder: temporaryFolder(t) };
}

test("many images in one tar: in the order given, each blob once, and one line on stdout for each", async (t) => {
  const { registry, references, folder } = await serveBundle(t);
  const [first, second, third] = references;
  const { stdout, stderr } = await succeed([...OPTIONS, second, first, third, "b.tar"], {
    cwd: folder,
  });
  const files = filesOf(readFileSync(join(folder, "b.tar")));
  const order = [IMAGES[1], IMAGES[0], THIRD] as TestImage[];
  const held = [...order.map(({ digest }) => digest), ...blobsOf(...order)];
  assert.deepEqual([...files.keys()].slice(3).sort(), held.map(blobName).sort());
  assert.deepEqual(refNames(indexEntries(files)), [second, first, third]);
  assert.deepEqual(
    indexEntries(files).map(({ digest }) => digest),
    order.map(({ digest }) => digest),
  );
  assert.deepEqual(
    dockerEntries(files),
    order.map(({ config, layers }, at) => ({
      Config: blobName(config.digest),
      RepoTags: [[second, first, third][at]],
      Layers: layers.map(({ digest }) => blobName(digest)),
    })),
  );
  assert.deepEqual(fetched(registry), blobsOf(...order).sort());
  assert.equal(
    String(stdout),
    order.map(({ digest }, at) => `${[second, first, third][at]}@${digest}\n`).join(""),
  );
  assert.match(stderr, /3 images/);
});

test("--from reads a file or stdin, with comments and other line ends; positionals come first", async (t) => {
  const {
    references: [first, second, third],
    folder,
  } = await serveBundle(t);
  await succeed([...OPTIONS, first, second, third, "plain.tar"], { cwd: folder });
  const plain = readFileSync(join(folder, "plain.tar"));
  const list = `# what goes to the other side\r\n\r\n  ${second}\t# the database\n\n${third}\r\n${first}`;
  writeFileSync(join(folder, "images.txt"), list);
  await succeed([...OPTIONS, first, "--from", "images.txt", "file.tar"], { cwd: folder });
  assert.ok(
    readFileSync(join(folder, "file.tar")).equals(plain),
    "an image named twice is there once",
  );
  await succeed([...OPTIONS, "--from=-", "stdin.tar"], {
    cwd: folder,
    stdin: `${first}\n${second}\n${third}\n`,
  });
  assert.ok(readFileSync(join(folder, "stdin.tar")).equals(plain));
});

for (const [name, content] of [
  ["missing", undefined],
  ["empty", ""],
  ["only comments", "# nothing\n\n"],
] as const) {
  test(`a list that is ${name} is an error that names it, and asks nothing`, async (t) => {
    const { registry, folder } = await serveBundle(t);
    if (content !== undefined) writeFileSync(join(folder, "images.txt"), content);
    const { exitCode, stderr } = await runCommand([...OPTIONS, "--from", "images.txt", "b.tar"], {
      cwd: folder,
    });
    assert.deepEqual([exitCode, registry.requests.length], [2, 0]);
    assert.match(stderr, content === undefined ? /images\.txt/ : /IMAGE/);
    assert.ok(!existsSync(join(folder, "b.tar")));
  });
}

for (const [name, args, pick] of [
  ["by tag", OPTIONS, ([first, second, third]) => [third, first, second]],
  ["by tag and digest of the index", OPTIONS, ([first]) => [`${first}@${FIRST.digest}`]],
  [
    "by the digest of an index alone",
    OPTIONS,
    ([first]) => [first.replace(":1.0", `@${FIRST.digest}`)],
  ],
  [
    "by the digest of a manifest alone",
    OPTIONS,
    ([, , third]) => [third.replace(/:3$/, `@${THIRD.digest}`)],
  ],
  ["every platform", ["--scheme", "http", "--platform", "all"], (references) => references],
  [
    "another platform",
    ["--scheme", "http", "--os=linux", "--arch=arm64"],
    ([first, second]) => [second, first],
  ],
] as [string, string[], (references: Bundle["references"]) => string[]][]) {
  test(`the lock file gives the same bytes again, when all tags have moved: ${name}`, async (t) => {
    const { registry, references, folder } = await serveBundle(t);
    const { stdout } = await succeed([...args, ...pick(references), "a.tar"], { cwd: folder });
    for (const [at, repository] of ["team/first", "team/second", "third"].entries()) {
      registry.add(makeImage({ seed: `moved-${at}` }), repository, ["1.0", "2.0", "3"][at]);
    }
    writeFileSync(join(folder, "images.lock"), stdout);
    const again = await succeed([...args, "--from", "images.lock", "b.tar"], { cwd: folder });
    assert.ok(readFileSync(join(folder, "a.tar")).equals(readFileSync(join(folder, "b.tar"))));
    assert.equal(String(again.stdout), String(stdout));
  });
}

test("every failure of a bundle is named at once, before a layer moves", async (t) => {
  const {
    registry,
    references: [first, second, third],
    folder,
  } = await serveBundle(t);
  registry.on({ repository: "team/secret" }, { status: 403 });
  registry.add(
    makeMultiPlatform(["windows/amd64", "linux/s390x"], { seed: "other" }),
    "team/other",
    "9",
  );
  const bad = [
    first.replace("1.0", "1.1"),
    `${registry.host}/team/none:1`,
    `${registry.host}/team/secret:1`,
    `${registry.host}/team/other:9`,
  ];
  writeFileSync(join(folder, "b.tar"), "precious");
  const args = [...OPTIONS, "--retries=0", first, ...bad, second, third, "b.tar"];
  const { exitCode, stderr, stdout } = await runCommand(args, { cwd: folder });
  assert.deepEqual([exitCode, stdout.length], [1, 0]);
  const named = [
    /team\/first:1\.1/,
    /team\/none/,
    /team\/secret/,
    /team\/other:9.*linux\/amd64/,
    /linux\/s390x/,
  ];
  for (const words of named) assert.match(stderr, words);
  assert.doesNotMatch(stderr, /team\/second|third:3/, "what is right is not blamed");
  assert.equal(registry.seen({ kind: "layer" }).length, 0);
  assert.deepEqual(readdirSync(folder), ["b.tar"]);
  assert.equal(readFileSync(join(folder, "b.tar"), "utf8"), "precious");
});

test("every bad reference of a bundle is named at once, before any request", async (t) => {
  const {
    registry,
    references: [first],
    folder,
  } = await serveBundle(t);
  const list = `${first}\n${registry.host}/UPPER:1\nhttps://example.com/app\nexample.com/app@sha256:12\n`;
  const { exitCode, stderr } = await runCommand([...OPTIONS, "--from", "-", "b.tar"], {
    cwd: folder,
    stdin: list,
  });
  assert.deepEqual([exitCode, registry.requests.length], [2, 0]);
  for (const words of [/UPPER/, /https:\/\/example\.com\/app/, /sha256:12/])
    assert.match(stderr, words);
});

test("images of a bundle are resolved side by side", { timeout: 30_000 }, async (t) => {
  const { registry, references, folder } = await serveBundle(t);
  const tags = {
    kind: "manifest",
    where: ({ reference }: { reference: string }) => !reference.includes(":"),
  } as const;
  registry.on(tags, { wait: registry.arrived(tags, 3) });
  await succeed([...OPTIONS, ...references, "b.tar"], { cwd: folder });
});

test("one token serves a repository, however many tags and blobs", async (t) => {
  const {
    registry,
    references: [first, second],
    folder,
  } = await serveBundle(t, { auth: "bearer" });
  const other = registry.add(SECOND, "team/first", "other");
  await succeed([...OPTIONS, first, other, second, "b.tar"], { cwd: folder });
  assert.deepEqual(
    registry
      .tokenRequests()
      .map(({ query }) => query.get("scope"))
      .sort(),
    ["repository:team/first:pull", "repository:team/second:pull"],
  );
});

// ====== Whole indexes, artifacts ======

test("--platform all keeps the index byte for byte, with every child, attestations too", async (t) => {
  const registry = await startRegistry({}, t);
  const inner = makeMultiPlatform(["linux/riscv64"], { seed: "inner" });
  const app = makeMultiPlatform(["linux/arm64", "linux/amd64", "linux/arm/v7"], {
    seed: "app",
    attestations: true,
  });
  const index = makeIndex([...app.children.map((content) => ({ content })), inner]);
  const dest = join(temporaryFolder(t), "all.tar");
  const reference = registry.add(index, "team/app", "1.0");
  const { stdout } = await succeed(["--scheme", "http", "--platform", "all", reference, dest]);
  const files = filesOf(readFileSync(dest));
  const expected = [...index.manifests.keys(), ...index.blobs.keys()].map(blobName);
  assert.deepEqual([...files.keys()].slice(3).sort(), expected.sort());
  assert.ok(files.get(blobName(index.digest))?.equals(index.bytes));
  assert.deepEqual(
    indexEntries(files).map(({ digest, size }) => [digest, size]),
    [[index.digest, index.bytes.length]],
  );
  const amd64 = childOf(app, 1);
  assert.deepEqual(
    dockerEntries(files).map(({ Config, RepoTags }) => [Config, RepoTags]),
    [[blobName(amd64.config.digest), [reference]]],
  );
  assert.equal(String(stdout), `${reference}@${index.digest}\n`);
});

test("things that are not images are pulled as they are, and left out of manifest.json", async (t) => {
  const registry = await startRegistry({}, t);
  const artifacts: [string, TestContent][] = [
    ["chart", makeHelmChart()],
    ["report", makeOrasArtifact()],
    ["wasm", makeWasmArtifact()],
  ];
  const references = artifacts.map(([name, content]) => registry.add(content, name, "1"));
  const image = registry.add(THIRD, "third", "3");
  const dest = join(temporaryFolder(t), "b.tar");
  const { stdout } = await succeed(["--scheme", "http", ...references, image, dest]);
  const files = filesOf(readFileSync(dest));
  const held = artifacts.flatMap(([, content]) => [content.digest, ...content.blobs.keys()]);
  for (const digest of held) assert.ok(files.has(blobName(digest)), digest);
  const tops = [...artifacts.map(([, { digest }]) => digest), THIRD.digest];
  assert.deepEqual(
    indexEntries(files).map(({ digest }) => digest),
    tops,
  );
  assert.deepEqual(
    dockerEntries(files).map(({ RepoTags }) => RepoTags),
    [[image]],
  );
  assert.equal(String(stdout).split("\n").length, 5);
});

// ====== OCI layout folders ======

/** Every file below a folder, by its path in it. */
function listFolder(folder: string): string[] {
  const entries = readdirSync(folder, { recursive: true, withFileTypes: true });
  const files = entries
    .filter((entry) => entry.isFile())
    .map(({ parentPath, name }) => join(parentPath, name));
  return files.map((file) => file.slice(folder.length + 1)).sort();
}

/** A layout holds these images and nothing else, every blob right. */
function assertLayout(folder: string, images: TestImage[], names: (string | undefined)[]): void {
  const blobs = [...images.map(({ digest }) => digest), ...blobsOf(...images)].map(blobName);
  assert.deepEqual(listFolder(folder), [...new Set([...blobs, "index.json", "oci-layout"])].sort());
  for (const name of blobs) {
    const [, algorithm, hex] = name.split("/");
    assert.equal(
      digestOf(readFileSync(join(folder, name)), algorithm as Algorithm),
      `${algorithm}:${hex}`,
    );
  }
  assert.deepEqual(JSON.parse(readFileSync(join(folder, "oci-layout"), "utf8")), {
    imageLayoutVersion: "1.0.0",
  });
  const { schemaVersion, manifests } = JSON.parse(readFileSync(join(folder, "index.json"), "utf8"));
  assert.equal(schemaVersion, 2);
  assert.deepEqual(refNames(manifests), names);
}

test("a folder, new or there already, becomes an OCI layout, and a layout is added to", async (t) => {
  const {
    registry,
    references: [first, second, third],
    folder,
  } = await serveBundle(t);
  const [one, two] = IMAGES as [TestImage, TestImage];
  const { stdout } = await succeed([...OPTIONS, first, "new/"], { cwd: folder });
  const layout = join(folder, "new");
  assert.equal(String(stdout), `${first}@${one.digest}\n`);
  assertLayout(layout, [one], [first]);
  registry.forget();
  await succeed([...OPTIONS, second, third, "new"], { cwd: folder });
  assertLayout(layout, [one, two, THIRD], [first, second, third]);
  const own = blobsOf(two, THIRD).filter((digest) => !blobsOf(one).includes(digest));
  assert.deepEqual(fetched(registry), own.sort());
  const index = readFileSync(join(layout, "index.json"));
  registry.forget();
  await succeed([...OPTIONS, third, first, "new"], { cwd: folder });
  assert.deepEqual(
    fetched(registry).filter((digest) => digest !== THIRD.config.digest),
    [],
  );
  assert.equal(JSON.parse(String(index)).manifests.length, 3);
  assertLayout(layout, [one, two, THIRD], [second, third, first]);
  mkdirSync(join(folder, "empty"));
  await succeed([...OPTIONS, first, join(folder, "empty")]);
  assertLayout(join(folder, "empty"), [one], [first]);
});

test("a layout that others made keeps its entries and annotations; a tag that moved is replaced", async (t) => {
  const {
    registry,
    references: [first],
    folder,
  } = await serveBundle(t);
  const others = [
    {
      mediaType: "application/vnd.oci.image.manifest.v1+json",
      digest: `sha256:${"1".repeat(64)}`,
      size: 2,
    },
    {
      mediaType: "application/vnd.oci.image.manifest.v1+json",
      digest: `sha256:${"2".repeat(64)}`,
      size: 2,
      annotations: { "org.opencontainers.image.ref.name": "latest" },
    },
  ];
  const index = { schemaVersion: 2, annotations: { made: "by hand" }, manifests: others };
  writeFileSync(join(folder, "index.json"), JSON.stringify(index));
  await succeed([...OPTIONS, first, folder]);
  registry.add(SECOND, "team/first", "1.0");
  await succeed([...OPTIONS, first, folder]);
  const { manifests, annotations } = JSON.parse(readFileSync(join(folder, "index.json"), "utf8"));
  assert.deepEqual(annotations, index.annotations);
  assert.deepEqual(manifests.slice(0, 2), others);
  assert.deepEqual(
    manifests.slice(2).map(({ digest }: IndexEntry) => digest),
    [childOf(SECOND, 1).digest],
  );
});

test("blobs that a layout holds are verified, and mended", async (t) => {
  const {
    registry,
    references: [first],
    folder,
  } = await serveBundle(t);
  const image = childOf(FIRST, 1);
  await succeed([...OPTIONS, first, folder]);
  const [spoiled, cut] = blobsOf(image).slice(1) as [string, string];
  writeFileSync(
    join(folder, blobName(spoiled)),
    readFileSync(join(folder, blobName(spoiled))).fill(0, 10, 11),
  );
  writeFileSync(join(folder, blobName(cut)), "");
  registry.forget();
  await succeed([...OPTIONS, first, folder]);
  assert.deepEqual(fetched(registry), [spoiled, cut].sort());
  assertLayout(folder, [image], [first]);
});

test("a layout pull that was killed goes on; two at once in one folder do no harm", async (t) => {
  const {
    registry,
    references: [first, second],
    folder,
  } = await serveBundle(t);
  const [one, two] = IMAGES as [TestImage, TestImage];
  const held = gate();
  const until = held.promise;
  const pause = registry.on(
    { digest: BASE[0]?.digest ?? "", times: 2 },
    { pause: { after: 30_000, until } },
  );
  const killed = startCommand([...OPTIONS, first, folder]);
  await pause.reached;
  killed.child.kill("SIGKILL");
  await killed.result;
  const going = startCommand([...OPTIONS, first, folder]);
  await registry.arrived({ digest: BASE[0]?.digest ?? "" }, 2);
  const other = await runCommand([...OPTIONS, second, folder]);
  assert.equal(other.exitCode, 1);
  assert.match(other.stderr, /another imgpull/);
  held.open();
  const { exitCode, stderr } = await going.result;
  assert.equal(exitCode, 0, stderr);
  assertLayout(folder, [one], [first]);
  await succeed([...OPTIONS, second, folder]);
  assertLayout(folder, [one, two], [first, second]);
});

test("--reuse is a source for a layout too", async (t) => {
  const {
    registry,
    references: [first, second],
    folder,
  } = await serveBundle(t);
  await succeed([...OPTIONS, first, "first.tar"], { cwd: folder });
  registry.forget();
  await succeed([...OPTIONS, "--reuse", "first.tar", second, "layout/"], { cwd: folder });
  const [one, two] = IMAGES as [TestImage, TestImage];
  assert.deepEqual(
    fetched(registry),
    blobsOf(two)
      .filter((digest) => !blobsOf(one).includes(digest))
      .sort(),
  );
  assertLayout(join(folder, "layout"), [two], [second]);
});

test("an index.json that is none is not written over, and no layer moves", async (t) => {
  const {
    registry,
    references: [first],
    folder,
  } = await serveBundle(t);
  writeFileSync(join(folder, "index.json"), "precious");
  const { exitCode, stderr } = await runCommand([...OPTIONS, first, folder]);
  assert.deepEqual([exitCode, registry.seen({ kind: "layer" }).length], [1, 0]);
  assert.match(stderr, /index\.json/);
  assert.equal(readFileSync(join(folder, "index.json"), "utf8"), "precious");
});

/** A layout pull that fails when most blobs are there, and a third of the largest. */
async function interruptLayout(t: TestContext) {
  const {
    registry,
    references: [first],
    folder,
  } = await serveBundle(t);
  const image = childOf(FIRST, 1);
  const large = BASE[0]?.digest ?? "";
  const until = registry.arrived({ kind: "blob" }, blobsOf(image).length);
  registry.on({ digest: large, times: 1 }, { pause: { after: 10_000, until }, dropAfter: 20_000 });
  const failed = await runCommand([...OPTIONS, "-j", "2", "--retries", "0", first, folder]);
  assert.equal(failed.exitCode, 1);
  assert.ok(!existsSync(join(folder, "index.json")), "nothing points at what is not there");
  registry.forget();
  const finish = async (): Promise<(string | undefined)[]> => {
    await succeed([...OPTIONS, first, folder]);
    assertLayout(folder, [image], [first]);
    return registry
      .blobRequests()
      .map(({ digest, range }) => (digest === large ? `large ${range}` : digest));
  };
  return { folder, large, finish, others: blobsOf(image).filter((digest) => digest !== large) };
}

const isFinished = (name: string): boolean => /^blobs\/sha256\/[0-9a-f]{64}$/.test(name);

const LARGE_REST = "large bytes=20000-59999";

test("a layout pull that failed goes on where it stopped, to the byte", async (t) => {
  const { finish, folder, others } = await interruptLayout(t);
  const kept = others.filter((digest) => existsSync(join(folder, blobName(digest))));
  const asked = await finish();
  assert.ok(asked.includes(LARGE_REST), String(asked));
  assert.deepEqual(
    asked.filter((digest) => kept.includes(digest ?? "")),
    [],
  );
});

for (const [what, isGone] of [
  ["partials", true],
  ["partials", false],
  ["finished", true],
  ["finished", false],
] as const) {
  test(`damage to a layout between two runs is repaired: ${what} ${isGone ? "gone" : "spoiled"}`, async (t) => {
    const { finish, folder } = await interruptLayout(t);
    const blobs = listFolder(folder).filter((name) => name.startsWith("blobs/"));
    const files = {
      partials: blobs.filter((name) => name.endsWith(".partial")),
      finished: blobs.filter(isFinished),
    };
    assert.ok(files.partials.length === 1 && files.finished.length > 0, blobs.join(" "));
    for (const name of files[what]) {
      if (isGone) rmSync(join(folder, name));
      else writeFileSync(join(folder, name), readFileSync(join(folder, name)).fill(1, 5, 50));
    }
    await finish();
  });
}

// ====== Streams ======

interface Streamed {
  registry: Registry;
  reference: string;
  folder: string;
  tar: Buffer;
}

async function serveStream(t: TestContext, content: TestContent): Promise<Streamed> {
  const registry = await startRegistry({}, t);
  const folder = temporaryFolder(t);
  const reference = registry.add(content, "team/app", "1.0");
  await succeed([...OPTIONS, reference, "app.tar"], { cwd: folder });
  registry.forget();
  return { registry, reference, folder, tar: readFileSync(join(folder, "app.tar")) };
}

const APP = makeMultiPlatform(["linux/amd64"], {
  seed: "app",
  layers: [300_000, 3_000_000, 20_000],
});

test("DEST - is the same tar on stdout and nothing else, also from a bad line", async (t) => {
  const { registry, reference, tar, folder } = await serveStream(t, APP);
  const { stdout, stderr } = await succeed([...OPTIONS, reference, "-"], { cwd: folder });
  assert.ok(stdout.equals(tar));
  assert.match(stderr, /1 image, /);
  const drops = childOf(APP).layers.map(({ digest, bytes }) =>
    registry.on({ digest, times: 1 }, { dropAfter: Math.floor(bytes.length / 3) }),
  );
  const dropped = await succeed([...OPTIONS, "-q", reference, "-"], { cwd: folder });
  assert.deepEqual(
    drops.map(({ hits }) => hits),
    [1, 1, 1],
  );
  assert.ok(dropped.stdout.equals(tar));
  assert.deepEqual(readdirSync(folder), ["app.tar"]);
});

for (const [name, fault] of Object.entries({
  "in ranges, put in order": {},
  "in ranges, each dropped once": { dropAfter: 1_000_000 },
  "whole, where ranges are ignored": { ignoreRange: true },
} as Record<string, Fault>)) {
  test(`far away, a stream's large layer comes ${name}`, { timeout: 30_000 }, async (t) => {
    const large = makeMultiPlatform(["linux/amd64"], { seed: "far", layers: [14_000_000, 9000] });
    const { registry, reference, tar } = await serveStream(t, large);
    const digest = childOf(large).layers[0]?.digest ?? "";
    makeFar(registry);
    registry.on({ digest, ranged: true, ...("dropAfter" in fault && { times: 2 }) }, fault);
    const { stdout } = await succeed([...OPTIONS, reference, "-"]);
    assert.ok(stdout.equals(tar));
    const ranges = registry.blobRequests(digest).map(({ range = "whole" }) => range);
    assert.ok(
      ranges.length > 1 && ranges.every((range) => /^bytes=\d+-\d+$/.test(range)),
      ranges.join(" "),
    );
    if ("dropAfter" in fault || "ignoreRange" in fault) return;
    await registry.settled();
    assert.equal(registry.bytesServed(digest), 14_000_000);
  });
}

test("Ctrl-C ends a stream without its trailer", async (t) => {
  const { registry, reference } = await serveStream(t, APP);
  const digest = childOf(APP).layers[1]?.digest ?? "";
  const pause = registry.on(
    { digest, times: 1 },
    { pause: { after: 2_000_000, until: new Promise(() => {}) } },
  );
  const { child: process, result } = startCommand([...OPTIONS, "-q", reference, "-"]);
  await pause.reached;
  process.kill("SIGINT");
  const { exitCode, stdout, stderr } = await result;
  assert.deepEqual([exitCode, stderr], [130, ""]);
  assert.throws(() => readTar(stdout), /the tar ends|trailer/);
});

test("a stream that fails has no trailer, and exits 1", async (t) => {
  for (const fault of [{ corruptAt: 2_000_000 }, { status: 404 }]) {
    const { registry, reference } = await serveStream(t, APP);
    registry.on({ digest: childOf(APP).layers[1]?.digest ?? "" }, fault);
    const { exitCode, stdout, stderr } = await runCommand([...OPTIONS, reference, "-"]);
    assert.equal(exitCode, 1);
    assert.match(stderr, new RegExp(childOf(APP).layers[1]?.digest ?? ""));
    assert.throws(() => readTar(stdout), /the tar ends|trailer/);
  }
});

test("a pipe that is closed ends the command quietly", async (t) => {
  const { registry, reference } = await serveStream(t, APP);
  const { child: process, result } = startCommand([...OPTIONS, "-q", reference, "-"]);
  process.stdout?.once("data", () => process.stdout?.destroy());
  const { stderr, exitCode } = await result;
  assert.equal(stderr, "");
  assert.notEqual(exitCode, null);
  await registry.settled();
});

for (const stream of ["stdout", "stderr"] as const) {
  test(`a reader of ${stream} that has gone does not spoil a pull into a file`, async (t) => {
    const { reference, tar, folder } = await serveStream(t, APP);
    const { child: process, result } = startCommand([...OPTIONS, reference, "again.tar"], {
      cwd: folder,
    });
    process[stream]?.destroy();
    const { exitCode, stderr, stdout } = await result;
    assert.ok(readFileSync(join(folder, "again.tar")).equals(tar));
    assert.deepEqual(readdirSync(folder).sort(), ["again.tar", "app.tar"]);
    assert.doesNotMatch(stderr, /^\s+at |EPIPE/m);
    if (stream === "stderr")
      assert.deepEqual([exitCode, String(stdout).includes(reference)], [0, true]);
  });
}

test("a slow reader holds the line back: read-ahead and memory are bounded", {
  timeout: 60_000,
}, async (t) => {
  const large = makeMultiPlatform(["linux/amd64"], { seed: "slow", layers: [128_000_000] });
  const registry = await startRegistry({}, t);
  const reference = registry.add(large, "team/app", "1.0");
  const { child: process, result } = startCommand([...OPTIONS, "-q", reference, "-"]);
  let readBytes = 0;
  let aheadBytes = 0;
  let peakMemory = 0;
  const { stdout, pid } = process;
  if (!stdout) return assert.fail("stdout is no pipe");
  const slowDown = async (): Promise<void> => {
    stdout.pause();
    for (let turn = 0; turn < 20; turn += 1) await new Promise(setImmediate);
    stdout.resume();
  };
  stdout.on("data", (chunk: Buffer) => {
    readBytes += chunk.length;
    aheadBytes = Math.max(aheadBytes, registry.bytesServed() - readBytes);
    const status = existsSync(`/proc/${pid}/status`)
      ? readFileSync(`/proc/${pid}/status`, "latin1")
      : "";
    peakMemory = Math.max(peakMemory, Number(/VmHWM:\s+(\d+) kB/.exec(status)?.[1] ?? 0) * 1024);
    void slowDown();
  });
  const { exitCode, stdout: tar } = await result;
  assert.equal(exitCode, 0);
  filesOf(tar);
  assert.ok(aheadBytes > 8 * MIB, `the reader was not slow: ${aheadBytes} bytes ahead`);
  // The window, and what Linux may hold in the sockets of one connection: 32 MiB to read, 4 MiB to send.
  assert.ok(
    aheadBytes < internals.TUNING.streamWindowBytes + 48 * MIB,
    `${aheadBytes} bytes ahead of the reader`,
  );
  assert.ok(peakMemory < 192 * MIB, `${peakMemory} bytes of memory`);
});

const isWindows = process.platform === "win32";

test("a FIFO, a device and a link to one are refused as DEST, and stay what they are", {
  skip: isWindows,
}, async (t) => {
  const { reference, folder } = await serveStream(t, APP);
  assert.equal(spawnSync("mkfifo", [join(folder, "fifo")]).status, 0);
  symlinkSync("/dev/null", join(folder, "null"));
  for (const name of ["fifo", "null"]) {
    const before = lstatSync(join(folder, name));
    const { exitCode, stdout, stderr } = await runCommand([
      ...OPTIONS,
      reference,
      join(folder, name),
    ]);
    assert.deepEqual([exitCode, String(stdout)], [1, ""], stderr);
    assert.match(stderr, /not a file/);
    assert.deepEqual(
      [lstatSync(join(folder, name)).ino, lstatSync("/dev/null").isCharacterDevice()],
      [before.ino, true],
    );
  }
  assert.deepEqual(readdirSync(folder).sort(), ["app.tar", "fifo", "null"]);
});

test("/dev/stdout as DEST is stdout: the tar, and no line after it", {
  skip: isWindows,
}, async (t) => {
  const { reference, tar } = await serveStream(t, APP);
  const { exitCode, stdout, stderr } = await runMain([...OPTIONS, reference, "/dev/stdout"]);
  assert.equal(exitCode, 0, stderr);
  assert.ok(stdout.equals(tar));
  assert.ok(!lstatSync("/dev/stdout").isFile(), "replaced");
});

// ====== The library's other methods ======

async function serveLibrary(t: TestContext, content: TestContent, options: RegistryOptions = {}) {
  const registry = await startRegistry(options, t);
  const url = registry.add(content, "team/app", "1.0");
  const opts: PullerOpts = { url, ...LINUX };
  return { registry, url, puller: new Puller(opts), folder: temporaryFolder(t), opts };
}

test("pullManifest gives the exact bytes of the index or of the platform's manifest", async (t) => {
  const { puller, url } = await serveLibrary(t, FIRST);
  const expected = (content: TestContent): ManifestHolder => ({
    mediaType: content.mediaType,
    digest: content.digest,
    bytes: content.bytes,
    imageUrl: url,
    manifest: JSON.parse(String(content.bytes)),
  });
  assert.deepEqual(await puller.pullManifest("list"), expected(FIRST));
  assert.deepEqual(await puller.pullManifest("image"), expected(childOf(FIRST, 1)));
  assert.deepEqual(await puller.getManifest(), expected(FIRST));
});

test("pullManifest of a single image: the image, and no list", async (t) => {
  const { puller } = await serveLibrary(t, THIRD);
  assert.equal((await puller.pullManifest("image")).digest, THIRD.digest);
  assert.equal((await puller.getManifest()).digest, THIRD.digest);
  const error = await failure(puller.pullManifest("list"));
  assert.match(error.message, /--manifest image/);
  assert.equal((await failure(puller.pullManifest("other" as "list"))).code, "BAD_OPTION");
});

test("headManifest is one HEAD where that says enough, and a GET where it does not", async (t) => {
  const { puller, registry } = await serveLibrary(t, FIRST);
  const head = { mediaType: FIRST.mediaType, digest: FIRST.digest, size: FIRST.bytes.length };
  assert.deepEqual(await puller.headManifest(), head);
  assert.deepEqual(
    registry.requests.map(({ method, kind }) => `${method} ${kind}`),
    ["HEAD manifest"],
  );
  for (const headers of [
    { "docker-content-digest": null },
    { "content-length": null },
    { "content-type": "text/plain" },
    { "docker-content-digest": "sha256:nonsense" },
  ] as Record<string, string | null>[]) {
    const poor = registry.on({ kind: "manifest", method: "HEAD" }, { headers });
    assert.deepEqual(await puller.headManifest(), head, JSON.stringify(headers));
    assert.equal(poor.hits, 1);
    poor.remove();
  }
  registry.remove("team/app", "1.0");
  assert.equal((await failure(puller.headManifest())).code, "NOT_FOUND");
});

test("pullBlobs leaves every blob as dir/HEX; those that are there are verified and kept", async (t) => {
  const image = childOf(FIRST, 1);
  const { puller, registry, folder } = await serveLibrary(t, FIRST);
  const dir = join(folder, "made/here");
  const holder = await puller.pullManifest("image");
  await puller.pullBlobs(holder, dir);
  const blobs = blobsOf(image);
  const hex = (digest: string): string => digest.slice(digest.indexOf(":") + 1);
  assert.deepEqual(readdirSync(dir), blobs.map(hex).sort());
  for (const digest of blobs) assert.equal(digestOf(readFileSync(join(dir, hex(digest)))), digest);

  const kept = statSync(join(dir, hex(blobs[0] ?? ""))).ino;
  const [, spoiled = "", gone = ""] = blobs;
  writeFileSync(join(dir, hex(spoiled)), readFileSync(join(dir, hex(spoiled))).fill(7, 100, 110));
  rmSync(join(dir, hex(gone)));
  registry.forget();
  await puller.pullBlobs(holder, dir);
  assert.deepEqual(fetched(registry), [spoiled, gone].sort());
  assert.equal(statSync(join(dir, hex(blobs[0] ?? ""))).ino, kept);
  for (const digest of blobs) assert.equal(digestOf(readFileSync(join(dir, hex(digest)))), digest);
  assert.deepEqual(readdirSync(dir), blobs.map(hex).sort());
});

test("pullBlobs: resumes, verifies, takes sha512, and refuses a list", async (t) => {
  const image = makeImage({ seed: "wide", algorithm: "sha512", layers: [200_000, 9000] });
  const { registry, folder, opts } = await serveLibrary(t, image);
  const url = registry.add(image, "team/app");
  const puller = new Puller({ ...opts, url, retries: 0 });
  const holder = await puller.pullManifest("image");
  const [large] = image.layers.map(({ digest }) => digest);
  const drop = registry.on({ digest: large ?? "", times: 1 }, { dropAfter: 50_000 });
  assert.equal((await failure(puller.pullBlobs(holder, folder))).code, "NETWORK");
  assert.equal(drop.hits, 1);
  await puller.pullBlobs(holder, folder);
  assert.equal(registry.blobRequests(large).at(-1)?.range, "bytes=50000-199999");
  assert.deepEqual(
    readdirSync(folder).sort(),
    blobsOf(image)
      .map((digest) => digest.split(":")[1])
      .sort(),
  );

  registry.on({ digest: large ?? "" }, { corruptAt: 60_000 });
  const other = join(folder, "other");
  assert.equal((await failure(puller.pullBlobs(holder, other))).code, "DIGEST_MISMATCH");
  assert.ok(!existsSync(join(other, large?.split(":")[1] ?? "")));
  const list = await serveLibrary(t, FIRST);
  const index = await list.puller.pullManifest("list");
  assert.equal((await failure(list.puller.pullBlobs(index, other))).code, "NOT_AN_IMAGE");
});

test("pullTar returns what DEST now holds", async (t) => {
  const { puller, folder, url } = await serveLibrary(t, FIRST);
  const dest = join(folder, "app.tar");
  const image = childOf(FIRST, 1);
  const held = {
    name: url,
    digest: image.digest,
    platform: "linux/amd64",
    layers: 3,
    sizeBytes: 0,
  };
  const first = await puller.pullTar(dest);
  assert.deepEqual(first, {
    ...held,
    sizeBytes: statSync(dest).size,
    fetchedBytes: blobBytes(image),
  });
  assert.deepEqual(await puller.pullTar(dest), { ...first, fetchedBytes: 0 });
});

test("a pull into a folder by the library, stopped and begun again", {
  timeout: 30_000,
}, async (t) => {
  const { registry, folder, opts, puller, url } = await serveLibrary(t, FIRST);
  const held = gate();
  const layer = BASE[0]?.digest ?? "";
  const pause = registry.on(
    { digest: layer, times: 1 },
    { pause: { after: 30_000, until: held.promise } },
  );
  const stop = new AbortController();
  const stopped = failure(new Puller({ ...opts, signal: stop.signal }).pullTar(folder));
  await pause.reached;
  stop.abort();
  assert.equal((await stopped).code, "ABORTED");
  assert.ok(!existsSync(join(folder, "index.json")));
  await puller.pullTar(folder);
  assertLayout(folder, [childOf(FIRST, 1)], [url]);
});

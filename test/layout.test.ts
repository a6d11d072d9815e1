// DEST is a folder: an OCI image layout that is made, added to, mended and gone on with.
import assert from "node:assert/strict";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join, sep } from "node:path";
import { type TestContext, test } from "node:test";
import { Puller, type PullerOpts } from "../imgpull.ts";
import {
  BASE,
  FIRST,
  fetched,
  IMAGES,
  type IndexEntry,
  OPTIONS,
  refNames,
  SECOND,
  serveBundle,
  succeed,
  THIRD,
} from "./support/bundle.ts";
import { cleanEnvironment, runCommand, startCommand, temporaryFolder } from "./support/command.ts";
import {
  type Algorithm,
  digestOf,
  MEDIA,
  makeImage,
  makeManifest,
  type TestContent,
  type TestImage,
} from "./support/image.ts";
import { blobName, blobsOf, childOf, failure, LINUX } from "./support/pull.ts";
import { type Fault, gate, startRegistry } from "./support/registry.ts";

// Puller reads process.env: a developer's proxies and credentials must not count here.
process.env = cleanEnvironment();

// ====== What a refusal leaves ======

const LONE = makeImage({ seed: "nothing stays" });
/** A layer that no disk has room for. */
const PETABYTE = makeManifest(MEDIA.ociManifest, {
  ...LONE.manifest,
  layers: LONE.manifest.layers.map((layer) => ({ ...layer, size: 2 ** 50 })),
});
PETABYTE.blobs.set(LONE.config.digest, LONE.configBytes);

const REFUSALS: [name: string, content: TestContent, fault: Fault][] = [
  ["has no room", PETABYTE, {}],
  ["is denied its layers", LONE, { status: 403 }],
  ["gets no byte of them", LONE, { dropAfter: 0 }],
  ["gets wrong ones", LONE, { corruptAt: 0 }],
];

for (const [name, content, fault] of REFUSALS) {
  test(`a folder that ${name} is as it was before, and none is left that was made`, async (t) => {
    const registry = await startRegistry({}, t);
    const reference = registry.add(content, "team/app", "1.0");
    registry.on({ kind: "layer" }, fault);
    const folder = temporaryFolder(t);
    mkdirSync(join(folder, "old"));
    writeFileSync(join(folder, "old", "mine.txt"), "mine");
    for (const dest of ["new/", "made/on/the way/", "old/", "old/inner/"]) {
      const puller = new Puller({ ...LINUX, url: reference, retries: 0 });
      await failure(puller.pullTar(`${folder}/${dest}`));
      const left = readdirSync(folder, { recursive: true }).map(String).sort();
      assert.deepEqual(left, ["old", join("old", "mine.txt")], dest);
    }
  });
}

test("a folder for pullBlobs is not left empty either", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(LONE, "team/app", "1.0");
  registry.on({ kind: "blob" }, { status: 403 });
  const folder = temporaryFolder(t);
  const puller = new Puller({ ...LINUX, url: reference, retries: 0 });
  const holder = await puller.getManifest();
  await failure(puller.pullBlobs(holder, join(folder, "a", "b")));
  assert.deepEqual(readdirSync(folder), []);
});

test("what a folder has of a layer stays for the next run", async (t) => {
  const large = makeImage({ seed: "a part stays", layers: [3_000_000] });
  const registry = await startRegistry({}, t);
  const reference = registry.add(large, "team/app", "1.0");
  const rule = registry.on({ kind: "layer" }, { dropAfter: 1_500_000 });
  const folder = join(temporaryFolder(t), "new");
  const puller = new Puller({ ...LINUX, url: reference, retries: 0, concurrency: 1 });
  await failure(puller.pullTar(`${folder}/`));
  assert.ok(listFolder(folder).some((name) => name.endsWith(".partial")));
  rule.remove();
  registry.forget();
  const { fetchedBytes } = await puller.pullTar(`${folder}/`);
  assert.ok(fetchedBytes < 2_000_000, `${fetchedBytes} bytes were fetched`);
});

// ====== OCI layout folders ======

/** Every file below a folder, by its path in it. */
function listFolder(folder: string): string[] {
  const entries = readdirSync(folder, { recursive: true, withFileTypes: true });
  const files = entries
    .filter((entry) => entry.isFile())
    .map(({ parentPath, name }) => join(parentPath, name));
  return files.map((file) => file.slice(folder.length + 1).replaceAll(sep, "/")).sort();
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

test("a pull into a folder by the library, stopped and begun again", {
  timeout: 30_000,
}, async (t) => {
  const {
    registry,
    references: [url],
    folder,
  } = await serveBundle(t);
  const opts: PullerOpts = { url, ...LINUX };
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
  await new Puller(opts).pullTar(folder);
  assertLayout(folder, [childOf(FIRST, 1)], [url]);
});

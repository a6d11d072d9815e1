// Tars at hand: an existing DEST and --reuse are sources that are not believed, --since leaves out
// layers.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  copyFileSync,
  readdirSync,
  readFileSync,
  renameSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import * as fs from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";
import { pullImages } from "../imgpull.ts";
import { runCommand, temporaryFolder } from "./support/command.ts";
import {
  makeArtifact,
  makeImage,
  makeIndex,
  makeLayer,
  makeMultiPlatform,
  readTar,
  type TestContent,
  type TestImage,
  type TestLayer,
  writeTar,
} from "./support/image.ts";
import { flip, interrupt, OPTIONS, succeed } from "./support/interrupt.ts";
import {
  assertRight,
  blobName,
  childOf,
  failure,
  pullWhole,
  serve,
  undisturbedTar,
} from "./support/pull.ts";
import { type Registry, startRegistry } from "./support/registry.ts";

const MIB = 1024 * 1024;

const BASE = [
  makeLayer({ seed: "base-1", sizeBytes: 200_000 }),
  makeLayer({ seed: "base-2", sizeBytes: 100_000 }),
];
const V1 = makeMultiPlatform(["linux/amd64"], {
  seed: "v1",
  layers: [...BASE, makeLayer({ seed: "v1-only" })],
});
const V2 = makeMultiPlatform(["linux/amd64"], {
  seed: "v2",
  layers: [...BASE, makeLayer({ seed: "v2-only" })],
});
const OWN_OF_V2 = [childOf(V2).config.digest, childOf(V2).layers[2]?.digest ?? ""].sort();

function fetchedBlobs(registry: Registry): (string | undefined)[] {
  return registry
    .blobRequests()
    .map(({ digest }) => digest)
    .sort();
}

test("an existing DEST is a source: only the new version's own blobs are fetched", async (t) => {
  const served = await serve(t, V1);
  const { registry, reference, dest } = served;
  await succeed([reference, dest]);
  registry.add(V2, "team/app", "1.0");
  registry.forget();
  const { stderr } = await succeed([reference, dest]);
  assert.deepEqual(fetchedBlobs(registry), OWN_OF_V2);
  assert.match(stderr, /300 kB reused/);
  await assertRight(t, served, V2);
  registry.forget();
  const again = await succeed([reference, dest]);
  assert.deepEqual(fetchedBlobs(registry), []);
  assert.match(again.stderr, /0 B fetched|nothing fetched/);
  await assertRight(t, served, V2);
});

test("an existing DEST is not believed: a damaged blob is fetched, the others are copied", async (t) => {
  const served = await serve(t, V1);
  const { registry, reference, dest } = served;
  await succeed([reference, dest]);
  const spoiled = BASE[0]?.digest ?? "";
  const { offset = NaN } =
    readTar(readFileSync(dest)).find(({ name }) => name === blobName(spoiled)) ?? {};
  flip(dest, offset + 100_000);
  registry.forget();
  await succeed([reference, dest]);
  assert.deepEqual(fetchedBlobs(registry), [spoiled]);
  await assertRight(t, served, V1);
});

test("what a tar at hand or an earlier run had wrong is counted as fetched only", async (t) => {
  const { reference, folder, dest, registry } = await serve(t, V1);
  const options = { scheme: "http", osType: "linux", archType: "amd64" } as const;
  const { blobs, layers } = childOf(V1);
  const allBytes = [...blobs.values()].reduce((sum, { length }) => sum + length, 0);
  const spoiled = BASE[0]?.digest ?? "";
  const old = join(folder, "old.tar");
  await pullImages([reference], old, options);
  const { offset = NaN } =
    readTar(readFileSync(old)).find(({ name }) => name === blobName(spoiled)) ?? {};
  flip(old, offset + 100_000);
  copyFileSync(old, dest);

  for (const reuse of [[], [old], [old, old]]) {
    const target = reuse.length === 0 ? dest : join(folder, `${reuse.length}.tar`);
    const { fetchedBytes, reusedBytes } = await pullImages([reference], target, {
      ...options,
      reuse,
    });
    assert.equal(fetchedBytes, 200_000);
    assert.equal(reusedBytes, allBytes - 200_000);
  }

  const resumed = join(folder, "resumed.tar");
  const gone = registry.on({ digest: layers[2]?.digest ?? "" }, { status: 404 });
  await assert.rejects(pullImages([reference], resumed, { ...options, concurrency: 1 }));
  gone.remove();
  flip(`${resumed}.partial`, offset + 100_000);
  const report = await pullImages([reference], resumed, options);
  assert.equal(report.fetchedBytes + report.resumedBytes, allBytes);
});

for (const [name, content] of Object.entries({
  "is empty": Buffer.alloc(0),
  "is no tar": Buffer.from("precious"),
  "is all zeros": Buffer.alloc(10_240),
  "is cut off": writeTar([["blobs/sha256/x", Buffer.alloc(5000)]]).subarray(0, 3000),
})) {
  test(`an existing DEST that ${name} is replaced, once all is right`, async (t) => {
    const served = await serve(t, V1);
    writeFileSync(served.dest, content);
    const gone = served.registry.on({ digest: BASE[0]?.digest ?? "" }, { status: 404 });
    const failed = await runCommand([...OPTIONS, served.reference, served.dest]);
    assert.equal(failed.exitCode, 1);
    assert.ok(readFileSync(served.dest).equals(content));
    gone.remove();
    await succeed([served.reference, served.dest]);
    await assertRight(t, served, V1);
  });
}

/**
 * Archives as other programs lay them out. Only what is named by its own digest can be looked up.
 */
function foreignArchives(image: TestImage): Record<string, [string, Buffer][]> {
  const hex = (digest: string): string => digest.slice("sha256:".length);
  const { config, configBytes, layers } = image;
  const list = (name: (digest: string) => string, last: string): [string, Buffer][] => [
    ...layers.map(({ digest, bytes }): [string, Buffer] => [name(hex(digest)), bytes]),
    [last, configBytes],
  ];
  return {
    crane: list((digest) => `${digest}.tar.gz`, config.digest),
    "skopeo's docker-archive": list((digest) => `${digest}.tar`, `${hex(config.digest)}.json`),
    "docker save and OCI archives": list(
      (digest) => `blobs/sha256/${digest}`,
      `blobs/sha256/${hex(config.digest)}`,
    ),
    "tar -C layout ./": list(
      (digest) => `./blobs/sha256/${digest}`,
      `./blobs/sha256/${hex(config.digest)}`,
    ),
  };
}

for (const [program, files] of Object.entries(foreignArchives(childOf(V1)))) {
  test(`--reuse takes blobs from an archive of ${program}`, async (t) => {
    const served = await serve(t, V1);
    const other = join(temporaryFolder(t), "other.tar");
    writeFileSync(other, writeTar(files));
    const before = readFileSync(other);
    await succeed(["--reuse", other, served.reference, served.dest]);
    assert.deepEqual(fetchedBlobs(served.registry), []);
    await assertRight(t, served, V1);
    assert.ok(readFileSync(other).equals(before));
  });
}

test("--reuse is repeatable and not believed: each blob from the first tar that really has it", async (t) => {
  const served = await serve(t, V1);
  const folder = temporaryFolder(t);
  type File = [name: string, bytes: Buffer];
  const [first, second] = BASE.map(({ digest, bytes }): File => [blobName(digest), bytes]) as [
    File,
    File,
  ];
  const lying = Buffer.from(first[1]);
  lying[5] = (lying[5] ?? 0) ^ 1;
  writeFileSync(
    join(folder, "a.tar"),
    writeTar([
      [first[0], lying],
      [second[0], second[1].subarray(1)],
    ]),
  );
  writeFileSync(join(folder, "b.tar"), writeTar([first]));
  writeFileSync(join(folder, "c.tar"), writeTar([second]));
  for (const dest of [served.dest, "-"]) {
    served.registry.forget();
    const sources = ["--reuse", "a.tar", "--reuse=b.tar", "--reuse", "c.tar"];
    const { stdout } = await succeed([...sources, served.reference, dest], folder);
    const own = [childOf(V1).config.digest, childOf(V1).layers[2]?.digest].sort();
    assert.deepEqual(fetchedBlobs(served.registry), own, dest);
    if (dest === "-") assert.ok(stdout.equals(await undisturbedTar(t, V1)));
    else await assertRight(t, served, V1);
  }
});

test("--reuse of DEST itself, and a partial that goes before it", async (t) => {
  const served = await serve(t, V1);
  await succeed([served.reference, served.dest]);
  served.registry.add(V2, "team/app", "1.0");
  await interrupt(served, 4000, "SIGKILL", ["--reuse", served.dest]);
  await succeed(["--reuse", served.dest, served.reference, served.dest]);
  assert.deepEqual(
    fetchedBlobs(served.registry).filter((digest) => !OWN_OF_V2.includes(digest ?? "")),
    [],
  );
  await assertRight(t, served, V2);
});

for (const option of ["--reuse", "--since"]) {
  for (const [name, content] of [
    ["no such file", undefined],
    ["no tar", "precious"],
    ["cut off", "cut"],
  ] as const) {
    test(`${option} with ${name} is an error that names it, before a layer moves`, async (t) => {
      const { registry, reference, dest, folder } = await serve(t, V1);
      const tar = join(temporaryFolder(t), "given.tar");
      if (content === "precious") writeFileSync(tar, content);
      if (content === "cut")
        writeFileSync(tar, writeTar([["file", Buffer.alloc(5000)]]).subarray(0, 3000));
      const { exitCode, stderr, stdout } = await runCommand([
        ...OPTIONS,
        option,
        tar,
        reference,
        dest,
      ]);
      assert.deepEqual(
        [exitCode, stdout.length, registry.blobRequests().length],
        [1, 0, 0],
        stderr,
      );
      assert.match(stderr, /given\.tar/);
      assert.deepEqual(readdirSync(folder), []);
    });
  }
}

test("--since leaves out the layers that the tar holds, and says what the delta needs", async (t) => {
  const served = await serve(t, V1);
  const { registry, reference, dest, folder } = served;
  await succeed([reference, dest]);
  renameSync(dest, join(folder, "base.tar"));
  registry.add(V2, "team/app", "2.0");
  registry.forget();
  const delta = join(folder, "delta.tar");
  const { stderr } = await succeed([
    "--since",
    join(folder, "base.tar"),
    reference.replace("1.0", "2.0"),
    delta,
  ]);
  assert.deepEqual(fetchedBlobs(registry), OWN_OF_V2);
  assert.match(stderr, /2 layers.*base\.tar/);
  assert.match(stderr, /containerd store/);
  assert.match(stderr, /--no-unpack/);
  const tar = readFileSync(delta);
  const names = readTar(tar).map(({ name }) => name);
  const held = [childOf(V2).digest, childOf(V2).config.digest, childOf(V2).layers[2]?.digest ?? ""];
  const first = ["blobs/", "blobs/sha256/", "oci-layout", "index.json", "manifest.json"];
  assert.deepEqual(names, [...first, ...held.map(blobName)]);
  const entry = readTar(tar).find(({ name }) => name === "manifest.json");
  const [described] = JSON.parse(
    tar.toString("utf8", entry?.offset, (entry?.offset ?? 0) + (entry?.size ?? 0)),
  );
  assert.equal(described.Layers.length, 3, "manifest.json names the layers that are left out too");
});

/**
 * docker finds a layer by all those below it (moby/moby#18723), so a layer is only there at the
 * bottom.
 */
test("--since leaves out what stands at the bottom of an image that the base loads, and nothing else", async (t) => {
  const [os1, os2, lib, app] = ["os1", "os2", "lib", "app"].map((seed) => makeLayer({ seed }));
  assert.ok(os1 && os2 && lib && app);
  const image = (seed: string, ...layers: TestLayer[]) => makeImage({ seed, layers });
  const arm = makeImage({ seed: "arm", layers: [lib, app], platform: "linux/arm64" });
  const index = makeIndex([image("amd", os1, app), arm]);
  const artifact = makeArtifact({
    layers: [{ mediaType: "application/vnd.example", bytes: os1.bytes }],
  });
  const cases: [name: string, base: TestContent[], next: TestContent[], omitted: TestLayer[]][] = [
    ["rebased", [image("a", os1, app)], [image("b", os2, app)], []],
    ["rebased in the middle", [image("a", os1, lib, app)], [image("b", os1, os2, app)], [os1]],
    ["one layer more", [image("a", os1, lib)], [image("b", os1, lib, app)], [os1, lib]],
    ["one layer less", [image("a", os1, lib, app)], [image("b", os1, lib)], [os1, lib]],
    ["other order", [image("a", os1, lib)], [image("b", lib, os1)], []],
    [
      "the longest of two",
      [image("a", os1), image("c", os1, lib)],
      [image("b", os1, lib, app)],
      [os1, lib],
    ],
    [
      "needed by another",
      [image("a", os1, app)],
      [image("b", os1, app), image("c", os2, app)],
      [os1],
    ],
    ["a platform that docker does not load", [index], [arm], []],
    ["one that it does", [index], [image("b", os1, app, lib)], [os1, app]],
    ["an artifact in the base", [artifact], [image("b", os1)], []],
    ["an artifact besides", [image("a", os1)], [image("b", os1), artifact], []],
  ];
  for (const [name, base, next, omitted] of cases) {
    const registry = await startRegistry({}, t);
    const folder = temporaryFolder(t);
    const pull = async (contents: TestContent[], dest: string, ...args: string[]) => {
      const references = contents.map((content, at) => registry.add(content, `app${at}`, dest));
      const options = ["-s", "http", "-q", ...args];
      const { exitCode, stderr } = await runCommand([...options, ...references, dest], {
        cwd: folder,
      });
      assert.equal(exitCode, 0, `${name}: ${stderr}`);
    };
    const isArm = next.includes(arm);
    await pull(base, "base.tar", "--platform", "all");
    await pull(
      next,
      "next.tar",
      "--platform",
      isArm ? "linux/arm64" : "linux/amd64",
      "--since",
      "base.tar",
    );
    const names = readTar(readFileSync(join(folder, "next.tar"))).map((entry) => entry.name);
    const wanted = next.flatMap(({ blobs }) => [...blobs.keys()]);
    assert.deepEqual(
      wanted.filter((digest) => !names.includes(blobName(digest))).sort(),
      omitted.map(({ digest }) => digest).sort(),
      name,
    );
  }
});

test("--verify of a delta with its base: the pair is checked", async (t) => {
  const served = await serve(t, V1);
  const { registry, reference, dest, folder } = served;
  await succeed([reference, dest]);
  const base = join(folder, "base.tar");
  renameSync(dest, base);
  registry.add(V2, "team/app", "2.0");
  const delta = join(folder, "delta.tar");
  await succeed(["--since", base, reference.replace("1.0", "2.0"), delta]);

  const alone = await runCommand(["--verify", delta]);
  assert.equal(alone.exitCode, 1);
  const { exitCode, stdout, stderr } = await runCommand(["--verify", delta, "--since", base]);
  assert.deepEqual([exitCode, stderr], [0, ""]);
  assert.match(
    String(stdout),
    /3 layers unpacked, 2 layers of the base: all is right\nloads in docker/,
  );

  // A base that is damaged, of another image, or has the layers in another place.
  const other = join(folder, "other.tar");
  const [first, second] = BASE.map(({ digest }) => digest) as [string, string];
  copyFileSync(base, other);
  flip(other, readFileSync(base).length - 60_000);
  const damaged = await runCommand(["--verify", delta, "--since", other]);
  assert.match(damaged.stderr, /other\.tar: blobs\/sha256\/\w+ is damaged/);
  registry.add(makeImage({ seed: "stranger" }), "team/app", "3.0");
  await succeed([reference.replace("1.0", "3.0"), other]);
  const stranger = await runCommand(["--verify", delta, "--since", other]);
  assert.equal(stranger.exitCode, 1);
  assert.ok(
    [first, second].every((digest) => stranger.stderr.includes(`${blobName(digest)} is missing`)),
  );
  registry.add(makeImage({ seed: "turned", layers: BASE.toReversed() }), "team/app", "4.0");
  await succeed([reference.replace("1.0", "4.0"), other]);
  const turned = await runCommand(["--verify", delta, "--since", other]);
  assert.equal(turned.exitCode, 0, turned.stderr);
  assert.doesNotMatch(String(turned.stdout), /loads in docker/);
  assert.match(String(turned.stdout), /not in docker: .* stands on other layers in the base/);
});

test("--since never leaves out configs or manifests, and the delta of the same image has no layers", async (t) => {
  const served = await serve(t, V1);
  const { reference, dest, folder } = served;
  await succeed([reference, dest]);
  copyFileSync(dest, join(folder, "base.tar"));
  await succeed(["--since", join(folder, "base.tar"), reference, dest]);
  const image = childOf(V1);
  assert.deepEqual(
    readTar(readFileSync(dest)).map(({ name }) => name),
    [
      "blobs/",
      "blobs/sha256/",
      "oci-layout",
      "index.json",
      "manifest.json",
      ...[image.digest, image.config.digest].map(blobName),
    ],
  );
});

test("a tar at hand that cannot be read is the disk's fault, told at once", async (t) => {
  const { reference, folder, dest } = await serve(t, makeImage({ layers: [3 * MIB] }));
  const base = join(folder, "base.tar");
  await pullWhole(reference, base);
  const handle = await fs.open(base, "r");
  const prototype = Object.getPrototypeOf(handle) as {
    read: (...args: unknown[]) => Promise<unknown>;
  };
  await handle.close();
  const { read } = prototype;
  t.after(() => (prototype.read = read));
  prototype.read = function failLarge(this: fs.FileHandle, ...args: unknown[]) {
    const error = Object.assign(new Error("EIO: i/o error, read"), {
      code: "EIO",
      syscall: "read",
    });
    return Number(args[2]) > 100_000 ? Promise.reject(error) : read.apply(this, args);
  };
  const { code, message } = await failure(pullWhole(reference, dest, { reuse: [base] }));
  assert.equal(code, "DISK");
  assert.match(message, /EIO/);
});

const IMAGE = makeImage();
const AMD64 = ["--scheme", "http", "--platform", "linux/amd64", "-q"];

for (const option of ["--reuse", "--since"]) {
  test(`${option} with a folder is an error in words`, async (t) => {
    const folder = temporaryFolder(t);
    const { exitCode, stderr } = await runCommand([
      "127.0.0.1:9/app:1",
      join(folder, "a.tar"),
      option,
      folder,
      ...AMD64,
    ]);
    assert.equal(exitCode, 1);
    assert.match(stderr, /^imgpull: .* is not a file\n$/);
  });
}

for (const option of ["--reuse", "--since"]) {
  const skip = process.platform === "win32";
  test(`${option} with a pipe that nobody writes into is an error at once`, { skip }, async (t) => {
    const folder = temporaryFolder(t);
    const pipe = join(folder, "pipe");
    assert.equal(spawnSync("mkfifo", [pipe]).status, 0);
    const args = ["127.0.0.1:9/app:1", join(folder, "a.tar"), option, pipe, ...AMD64];
    const { exitCode, stderr } = await runCommand(args, { guardMs: 10_000 });
    assert.equal(exitCode, 1);
    assert.match(stderr, /^imgpull: .*pipe: it is not a file\n$/);
  });
}

test("many blobs out of one tar print nothing", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(
    makeImage({ layers: Array<number>(12).fill(8192) }),
    "team/app",
    "1.0",
  );
  const tar = join(temporaryFolder(t), "a.tar");
  for (const run of ["fetched", "taken from DEST"]) {
    const { exitCode, stderr } = await runCommand([reference, tar, ...AMD64]);
    assert.deepEqual([exitCode, stderr], [0, ""], run);
  }
});

test("a delta is not written over its own base", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(IMAGE, "team/app", "1.0");
  const folder = temporaryFolder(t);
  const tar = join(folder, "a.tar");
  await runCommand([reference, tar, ...AMD64]);
  const base = readFileSync(tar);
  symlinkSync("a.tar", join(folder, "link.tar"));
  for (const since of [tar, `${folder}/./a.tar`, join(folder, "link.tar")]) {
    const { exitCode, stderr } = await runCommand([reference, tar, "--since", since, ...AMD64]);
    assert.notEqual(exitCode, 0, since);
    assert.match(stderr, /--since/);
    assert.ok(readFileSync(tar).equals(base));
  }
});

test("a tar that leaves nothing out needs no base, and says so", async (t) => {
  const registry = await startRegistry({}, t);
  const folder = temporaryFolder(t);
  const base = registry.add(makeImage({ seed: "other" }), "team/other", "1.0");
  await runCommand([base, join(folder, "base.tar"), ...AMD64]);
  const reference = registry.add(IMAGE, "team/app", "1.0");
  const args = [reference, join(folder, "a.tar"), "--since", join(folder, "base.tar"), ...AMD64];
  const { exitCode, stderr } = await runCommand(args);
  assert.equal(exitCode, 0, stderr);
  assert.doesNotMatch(stderr, /load that first/);
});

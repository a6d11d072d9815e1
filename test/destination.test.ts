// Where DEST lies: disks that are full, read-only or fail, folders that are none, links, modes.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  appendFileSync,
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statfsSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import * as fs from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { runCommand, temporaryFolder } from "./support/command.ts";
import { makeImage, makeLayer, makeMultiPlatform } from "./support/image.ts";
import { flip, OPTIONS } from "./support/interrupt.ts";
import {
  assertRight,
  assertUntouched,
  childOf,
  failure,
  pull,
  pullWhole,
  serve,
  undisturbedTar,
} from "./support/pull.ts";
import { gate, startRegistry } from "./support/registry.ts";

const APP = makeMultiPlatform(["linux/amd64"], {
  seed: "app",
  layers: [5_000_000, 700_000, 300_000],
});
const LARGE = childOf(APP).layers[0]?.digest ?? "";

const MIB = 1024 * 1024;
const AMD64 = ["--scheme", "http", "--platform", "linux/amd64", "-q"];

// ====== Disks ======

/**
 * An empty folder in which something is mounted, or undefined (and the test skipped) where we may
 * not.
 */
function mountIn(t: TestContext, mountAt: (folder: string) => string[]): string | undefined {
  const folder = mkdtempSync(join(tmpdir(), "imgpull-disk-"));
  const words = mountAt(folder);
  t.after(() => {
    spawnSync("umount", words.slice(-1));
    rmSync(folder, { recursive: true, force: true });
  });
  const { status, stderr, error } = spawnSync("mount", words);
  if (status === 0) return folder;
  t.skip(`NOT TESTED: nothing can be mounted here (${error?.message ?? stderr.toString().trim()})`);
  return undefined;
}

/** A file system of its own. */
function mountSmallDisk(t: TestContext, options: string, type = "tmpfs"): string | undefined {
  return mountIn(t, (folder) => ["-t", type, "-o", options, type, folder]);
}

test("a disk known to be too small is refused before a layer moves", async (t) => {
  const folder = mountSmallDisk(t, "size=2m");
  if (folder === undefined) return;
  const { registry, reference } = await serve(t, APP);
  const error = await failure(pull(reference, join(folder, "app.tar")));
  assert.equal(error.code, "DISK");
  assert.match(error.message, /full.*6\.0 MB.*2\.1 MB free/);
  assert.equal(registry.blobRequests().length, 0);
  assert.deepEqual(readdirSync(folder), []);
});

test("a disk that fills in mid-pull is named; with room again the same pull goes on", async (t) => {
  const folder = mountSmallDisk(t, "size=12m");
  if (folder === undefined) return;
  const { registry, reference } = await serve(t, APP);
  const dest = join(folder, "app.tar");
  writeFileSync(dest, "precious");
  const filled = gate();
  const pause = registry.on(
    { digest: LARGE, times: 1 },
    { pause: { after: 3_000_000, until: filled.promise } },
  );
  const pulling = failure(pull(reference, dest, { concurrency: 2 }));
  await pause.reached;
  while (statSync(`${dest}.partial`).blocks * 512 < 2_000_000) await new Promise(setImmediate);
  assert.throws(
    () => writeFileSync(join(folder, "filling"), Buffer.alloc(12 * 1024 * 1024)),
    /ENOSPC/,
  );
  filled.open();
  const error = await pulling;
  assert.equal(error.code, "DISK");
  assert.match(error.message, /app\.tar.*disk is full/);
  rmSync(join(folder, "filling"));
  assertUntouched({ folder, dest });
  await registry.settled();
  registry.forget();
  await pull(reference, dest);
  assert.ok(registry.bytesServed(LARGE) < 5_000_000, "went on from what was there");
  await assertRight(t, { folder, dest }, APP);
});

test("a read-only file system is named before anything is asked", async (t) => {
  const folder = mountSmallDisk(t, "size=2m,ro");
  if (folder === undefined) return;
  const { registry, reference } = await serve(t, APP);
  const error = await failure(pull(reference, join(folder, "app.tar")));
  assert.equal(error.code, "DISK");
  assert.match(error.message, /app\.tar.*read-only/);
  assert.equal(registry.requests.length, 0);
});

const isRoot = process.getuid?.() === 0;

test("a folder one may not write to is named", {
  skip: isRoot && "NOT TESTED: root may write anywhere",
}, async (t) => {
  const { registry, reference, folder, dest } = await serve(t, APP);
  chmodSync(folder, 0o555);
  t.after(() => chmodSync(folder, 0o755));
  const error = await failure(pull(reference, dest));
  assert.deepEqual([error.code, registry.requests.length], ["DISK", 0]);
  assert.match(error.message, /app\.tar.*permission denied/);
});

for (const [name, inside, words] of [
  ["a folder that is not there", "missing/app.tar", /app\.tar: the directory .*missing: no such/],
  ["a folder that is a file", "file/app.tar", /app\.tar.*directory/],
] as const) {
  test(`DEST in ${name} is refused before anything is asked`, async (t) => {
    const { registry, reference, folder } = await serve(t, APP);
    writeFileSync(join(folder, "file"), "precious");
    const error = await failure(pull(reference, join(folder, inside)));
    assert.deepEqual([error.code, registry.requests.length], ["DISK", 0]);
    assert.match(error.message, words);
    assert.deepEqual(readdirSync(folder), ["file"]);
    assert.equal(readFileSync(join(folder, "file"), "utf8"), "precious");
  });
}

test("what a sync in the background says of the disk is not lost", async (t) => {
  const layers = [1, 2, 3, 4, 5, 6].map((at) =>
    makeLayer({ seed: `sync-${at}`, sizeBytes: 24 * MIB, compression: "none" }),
  );
  const served = await serve(t, makeImage({ layers }));
  const handle = await fs.open(served.folder, "r");
  const prototype = Object.getPrototypeOf(handle) as { sync: () => Promise<void> };
  await handle.close();
  const { sync } = prototype;
  let syncs = 0;
  t.after(() => (prototype.sync = sync));
  prototype.sync = async function failOnce(this: fs.FileHandle) {
    syncs += 1;
    const mine = syncs;
    await new Promise((done) => setTimeout(done, 300)); // a disk that is slower than the line, so that writes wait for it
    if (mine === 2)
      throw Object.assign(new Error("EIO: i/o error, fsync"), { code: "EIO", syscall: "fsync" });
    return sync.call(this);
  };
  const { code } = await failure(pullWhole(served.reference, served.dest));
  assert.equal(code, "DISK");
  assert.ok(!existsSync(served.dest));
  prototype.sync = sync;
  await pullWhole(served.reference, served.dest);
  assert.ok(existsSync(served.dest));
});

for (const [type, options] of [
  ["ramfs", "mode=755"],
  ["tmpfs", "size=0"],
] as const) {
  test(`a file system that reports no blocks is not full: ${type}`, async (t) => {
    const folder = mountSmallDisk(t, options, type);
    if (folder === undefined) return;
    assert.equal(statfsSync(folder).blocks, 0);
    const { reference } = await serve(t, APP);
    await pull(reference, join(folder, "app.tar"));
    await pull(reference, join(folder, "layout/"));
    await assertRight(t, { folder, dest: join(folder, "app.tar") }, APP, ["app.tar", "layout"]);
  });
}

for (const dest of ["app.tar", "layout/"]) {
  test(`used-up inodes are told as such: ${dest}`, async (t) => {
    const folder = mountSmallDisk(t, "size=20m,nr_inodes=8");
    if (folder === undefined) return;
    const { reference } = await serve(t, APP);
    const count = 6;
    for (let at = 0; at < count; at += 1) writeFileSync(join(folder, `file${at}`), "");
    const { code, message } = await failure(pull(reference, join(folder, dest)));
    assert.equal(code, "DISK");
    assert.match(message, /inodes/);
    assert.doesNotMatch(message, /no such file|disk is full/);
  });
}

// ====== DEST that cannot be renamed onto ======

/** A folder in which app.tar is a file of elsewhere, mounted there by itself. */
function mountDest(t: TestContext, outside: string): string | undefined {
  return mountIn(t, (folder) => {
    writeFileSync(join(folder, "app.tar"), "");
    return ["--bind", outside, join(folder, "app.tar")];
  });
}

for (const [what, before] of [
  ["empty", Buffer.alloc(0)],
  ["longer", Buffer.alloc(9_000_000, "x")],
] as const) {
  test(`DEST that is mounted by itself is written in place: ${what} before`, async (t) => {
    const { reference } = await serve(t, APP);
    const outside = join(temporaryFolder(t), "outside.tar");
    writeFileSync(outside, before);
    const { ino } = statSync(outside);
    const folder = mountDest(t, outside);
    if (folder === undefined) return;
    const dest = join(folder, "app.tar");
    const { warnings } = await pull(reference, dest);
    assert.match(warnings.join("\n"), /mounted by itself.*in place.*not one step/);
    assert.equal(statSync(outside).ino, ino);
    assert.ok(readFileSync(outside).equals(await undisturbedTar(t, APP)));
    await assertRight(t, { folder, dest }, APP);

    const again = await pull(reference, dest);
    assert.deepEqual(again.warnings, []);
  });
}

test("a mounted DEST without room for the tar stays as it is, and the partial too", async (t) => {
  const { reference } = await serve(t, APP);
  const disk = mountSmallDisk(t, "size=2m");
  if (disk === undefined) return;
  const outside = join(disk, "outside.tar");
  writeFileSync(outside, "precious");
  const folder = mountDest(t, outside);
  if (folder === undefined) return;
  const dest = join(folder, "app.tar");
  const { code, message } = await failure(pull(reference, dest));
  assert.equal(code, "DISK");
  assert.match(message, /disk is full.*6\.0 MB are needed/);
  assertUntouched({ folder, dest });
  assert.ok(readdirSync(folder).includes("app.tar.partial"));
  spawnSync("umount", [dest]);
});

test("a folder that takes no renames: what is told is the reason, not what came of it", async (t) => {
  const served = await serve(t, APP);
  if (spawnSync("chattr", ["+a", served.folder]).status !== 0) {
    t.skip("NOT TESTED: no folder can be made append-only here");
    return;
  }
  t.after(() => spawnSync("chattr", ["-a", served.folder]));
  const { code, message } = await failure(pull(served.reference, served.dest));
  assert.equal(code, "DISK");
  assert.match(message, /app\.tar.*permission denied/);
  spawnSync("chattr", ["-a", served.folder]);
  await pull(served.reference, served.dest);
  await assertRight(t, served, APP);
});

// ====== DEST that is right already ======

const stampOf = (file: string): string => {
  const { ino, mtimeNs } = lstatSync(file, { bigint: true });
  return `${ino} ${mtimeNs}`;
};

function stampsBelow(folder: string): Record<string, string> {
  const names = readdirSync(folder, { recursive: true }) as string[];
  const files = names.filter((name) => lstatSync(join(folder, name)).isFile());
  return Object.fromEntries(files.map((name) => [name, stampOf(join(folder, name))]));
}

test("DEST that is right already is left alone, and the last line says so", async (t) => {
  const { registry, reference, folder, dest } = await serve(t, APP);
  const args = [...OPTIONS, reference, dest];
  const first = await runCommand(args);
  const before = stampOf(dest);
  registry.forget();
  const second = await runCommand(args);
  assert.equal(second.exitCode, 0, second.stderr);
  assert.match(
    second.stderr,
    /1 image, 6\.0 MB in \S+app\.tar: unchanged, 0 B fetched, [\d.]+ s\n$/,
  );
  assert.equal(String(second.stdout), String(first.stdout));
  assert.equal(stampOf(dest), before);
  assert.equal(registry.blobRequests().filter(({ digest }) => digest === LARGE).length, 0);
  await assertRight(t, { folder, dest }, APP);
});

test("a second copy's room is not needed to see that DEST is right", async (t) => {
  const folder = mountSmallDisk(t, "size=7m");
  if (folder === undefined) return;
  const { reference } = await serve(t, APP);
  const dest = join(folder, "app.tar");
  await pull(reference, dest);
  const before = stampOf(dest);
  await pull(reference, dest);
  assert.equal(stampOf(dest), before);
});

test("what an older pull left beside a DEST that is right goes away", async (t) => {
  const served = await serve(t, APP);
  await pull(served.reference, served.dest);
  const before = stampOf(served.dest);
  for (const suffix of [".partial", ".partial.journal", ".partial.old"])
    writeFileSync(`${served.dest}${suffix}`, "x");
  await pull(served.reference, served.dest);
  assert.equal(stampOf(served.dest), before);
  await assertRight(t, served, APP);
});

for (const [what, spoil] of Object.entries({
  "a bit of a layer": (dest: string) => flip(dest, statSync(dest).size - 200_000),
  "a bit of a header": (dest: string) => flip(dest, 3),
  "its last byte": (dest: string) => flip(dest, statSync(dest).size - 1),
  "a byte too many": (dest: string) => appendFileSync(dest, "x"),
})) {
  test(`DEST that is nearly right is written anew: ${what}`, async (t) => {
    const served = await serve(t, APP);
    await pull(served.reference, served.dest);
    spoil(served.dest);
    const { ino } = statSync(served.dest);
    await pull(served.reference, served.dest);
    assert.notEqual(statSync(served.dest).ino, ino);
    await assertRight(t, served, APP);
  });
}

test("a layout that has all of it is left alone, whatever else it has", async (t) => {
  const { registry, reference, folder } = await serve(t, APP);
  const other = registry.add(makeImage({ seed: "beside" }), "team/beside", "1.0");
  const layout = join(folder, "layout");
  for (const image of [reference, other])
    assert.equal((await runCommand([...AMD64, image, `${layout}/`])).exitCode, 0);
  const before = stampsBelow(layout);
  const again = await runCommand([...AMD64.slice(0, -1), reference, `${layout}/`]);
  assert.match(again.stderr, /unchanged, 0 B fetched/);
  assert.deepEqual(stampsBelow(layout), before);
});

test("what a tag had that has moved on does not stay in a layout for ever", async (t) => {
  const { registry, reference, folder } = await serve(t, APP);
  const layout = join(folder, "layout");
  const { remove } = registry.on({ digest: LARGE }, { dropAfter: 1_000_000 });
  await failure(pull(reference, `${layout}/`, { retries: 0 }));
  remove();
  const partials = () =>
    Object.keys(stampsBelow(layout)).filter((name) => name.includes("partial"));
  assert.ok(partials().length > 0, "something is left to go on from");
  registry.add(makeMultiPlatform(["linux/amd64"], { seed: "moved on" }), "team/app", "1.0");
  await pull(reference, `${layout}/`);
  assert.deepEqual(partials(), []);
});

// ====== Links and modes ======

test("a symbolic link at DEST stays one, and what it points at is replaced", async (t) => {
  const served = await serve(t, APP);
  mkdirSync(join(served.folder, "store"));
  writeFileSync(join(served.folder, "store/real.tar"), "old");
  symlinkSync("store/real.tar", served.dest);
  await pull(served.reference, served.dest);
  assert.equal(readlinkSync(served.dest), "store/real.tar");
  assert.ok(readFileSync(served.dest).equals(await undisturbedTar(t, APP)));
  assert.deepEqual(readdirSync(join(served.folder, "store")), ["real.tar"]);
});

test("a link that leads nowhere yet, in a folder that is itself a link, is followed as the system does", async (t) => {
  const image = makeImage({ seed: "links" });
  const { reference, folder } = await serve(t, image);
  for (const name of ["a", "b", "b/c"]) mkdirSync(join(folder, name));
  symlinkSync("../b/c", join(folder, "a/link"));
  symlinkSync("../y.tar", join(folder, "b/c/x.tar"));
  await pull(reference, join(folder, "a/link/x.tar"));
  assert.deepEqual(readdirSync(join(folder, "b")).sort(), ["c", "y.tar"]);
  assert.equal(readlinkSync(join(folder, "b/c/x.tar")), "../y.tar");
});

test("a loop of links at DEST is an error, and none of them is replaced", async (t) => {
  const { registry, reference, folder } = await serve(t, APP);
  symlinkSync("b.tar", join(folder, "a.tar"));
  symlinkSync("a.tar", join(folder, "b.tar"));
  symlinkSync("self.tar", join(folder, "self.tar"));
  for (const name of ["a.tar", "self.tar"]) {
    const { code, message } = await failure(pull(reference, join(folder, name)));
    assert.equal(code, "DISK");
    assert.match(message, new RegExp(`${name}.*loop of links`));
  }
  assert.equal(registry.requests.length, 0);
  for (const name of readdirSync(folder)) assert.ok(lstatSync(join(folder, name)).isSymbolicLink());
});

test("a link to a link that leads nowhere yet: both stay", async (t) => {
  const { reference, folder } = await serve(t, APP);
  symlinkSync("b.tar", join(folder, "a.tar"));
  symlinkSync("c.tar", join(folder, "b.tar"));
  await pull(reference, join(folder, "a.tar"));
  assert.equal(readlinkSync(join(folder, "a.tar")), "b.tar");
  assert.equal(readlinkSync(join(folder, "b.tar")), "c.tar");
  assert.ok(readFileSync(join(folder, "c.tar")).equals(await undisturbedTar(t, APP)));
});

const IMAGE = makeImage();

test("a link at DEST to a file that is not there yet stays a link", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(IMAGE, "team/app", "1.0");
  const folder = temporaryFolder(t);
  mkdirSync(join(folder, "store"));
  symlinkSync("store/a.tar", join(folder, "a.tar"));
  const { exitCode, stderr } = await runCommand([reference, join(folder, "a.tar"), ...AMD64]);
  assert.equal(exitCode, 0, stderr);
  assert.equal(readlinkSync(join(folder, "a.tar")), "store/a.tar");
  assert.ok(readFileSync(join(folder, "store/a.tar")).length > 0);
});

test("what was private stays so, and a partial can be opened again whatever DEST's mode was", async (t) => {
  const image = makeImage({ seed: "modes", layers: [3 * MIB, 70_000] });
  const { registry, reference, folder } = await serve(t, image);
  for (const [mode, partialMode] of [
    [0o600, 0o600],
    [0o444, 0o644],
    [0o400, 0o600],
  ] as const) {
    const dest = join(folder, `${mode.toString(8)}.tar`);
    writeFileSync(dest, "", { mode });
    const { remove } = registry.on({ digest: image.layers[1]?.digest as string }, { status: 404 });
    await failure(pull(reference, dest, { concurrency: 1 }));
    remove();
    assert.equal(statSync(`${dest}.partial`).mode & 0o777, partialMode & ~process.umask());
    await pull(reference, dest);
    assert.equal(statSync(dest).mode & 0o777, partialMode & ~process.umask());
  }
});

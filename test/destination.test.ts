// Where DEST lies: disks that are full, read-only or fail, folders that are none, links, modes. SPEC §5.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
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

// ====== Disks ======

/** A file system of its own, or undefined (and the test skipped) where we may not mount one. */
function mountSmallDisk(t: TestContext, options: string): string | undefined {
  const folder = mkdtempSync(join(tmpdir(), "imgpull-disk-"));
  t.after(() => {
    spawnSync("umount", [folder]);
    rmSync(folder, { recursive: true, force: true });
  });
  const { status, stderr, error } = spawnSync("mount", [
    "-t",
    "tmpfs",
    "-o",
    options,
    "tmpfs",
    folder,
  ]);
  if (status === 0) return folder;
  t.skip(
    `NOT TESTED: no tmpfs can be mounted here (${error?.message ?? stderr.toString().trim()})`,
  );
  return undefined;
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

const IMAGE = makeImage();
const AMD64 = ["--scheme", "http", "--platform", "linux/amd64", "-q"];

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

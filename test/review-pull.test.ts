// What a review of the pull found: ranges that meet, a disk that fails behind the pull's back, aborts at odd moments,
// partials and locks that others left. Each of these failed once.
import assert from "node:assert/strict";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import * as fs from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";
import { type ImgpullError, internals, type Progress, Puller } from "../imgpull.ts";
import { cleanEnvironment, runCommand, startCommand } from "./support/command.ts";
import { makeImage, makeLayer } from "./support/image.ts";
import { assertRight, failure, LINUX, NAME, pull, serve, undisturbedTar } from "./support/pull.ts";
import { gate } from "./support/registry.ts";

const MIB = 1024 * 1024;
const OPTIONS = ["--scheme", "http", "--platform", "linux/amd64", "--name", NAME];

/** A pull with sources, of which the transfer and the plan are wanted too. */
function pullWhole(
  reference: string,
  destination: string,
  opts: { concurrency?: number; reuse?: string[] } = {},
) {
  const { reuse = [], ...more } = opts;
  const images = [{ reference: internals.parseReference(reference), name: NAME }];
  const clock = { now: Date.now, random: () => 0, sleep: async () => undefined };
  return internals.withSession(
    { url: reference, ...LINUX, ...more },
    (session) =>
      internals.pullImages(session, { images, destination, isAll: false, reuse }, () => undefined),
    { clock, environment: cleanEnvironment() },
  );
}

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
  // A killed run left three pieces, so that three ranges are missing between them.
  const held = [
    [4 * MIB, 5 * MIB],
    [8 * MIB, 9 * MIB],
    [11 * MIB, 12 * MIB],
  ] as const;
  const partial = Buffer.alloc(right.length);
  for (const [from, to] of held) right.copy(partial, offset + from, offset + from, offset + to);
  writeFileSync(`${dest}.partial`, partial);
  const lines = held.map((range) => range.join("-")).join(",");
  writeFileSync(`${dest}.partial.journal`, `${plan.id}\n${digest} ${lines};\n`);
  const first = gate();
  registry.on(
    { digest, where: ({ range }) => range?.startsWith("bytes=0-") === true },
    {
      ignoreRange: true,
      handler: async (_request, response, next) => {
        response.once("finish", first.open);
        await next();
      },
    },
  );
  const damage = registry.on(
    { digest, where: ({ range }) => range?.startsWith(`bytes=${5 * MIB}-`) === true, times: 1 },
    { wait: first.promise, corruptAt: 6 * MIB },
  );
  const { transfer } = await pullWhole(reference, dest, { concurrency: 2 });
  assert.equal(damage.hits, 1);
  for (const {
    doneBytes,
    descriptor: { size },
  } of transfer.jobs)
    assert.ok(doneBytes <= size);
  assert.ok(readFileSync(dest).equals(right));
});

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
    const mine = (syncs += 1);
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

test("an abort in the tick after any report ends in ABORTED, and in nothing uncaught", async (t) => {
  const image = makeImage({ seed: "ticks", layers: [2 * MIB, MIB + 5000] });
  const { reference, folder } = await serve(t, image);
  for (let round = 0; round < 70; round += 1) {
    const stop = new AbortController();
    let reports = 0;
    const onProgress = (): void => {
      if ((reports += 1) === round % 7) process.nextTick(() => stop.abort());
    };
    const puller = new Puller({ url: reference, ...LINUX, signal: stop.signal, onProgress });
    const outcome = await puller.pullTar(join(folder, `${round}.tar`)).then(
      () => "DONE",
      (error: ImgpullError) => error.code,
    );
    assert.ok(outcome === "DONE" || outcome === "ABORTED", outcome);
  }
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

test("the total is told before the first byte comes", { timeout: 30_000 }, async (t) => {
  const { reference, dest, registry } = await serve(t, makeImage({ layers: [70_000] }));
  const told = gate();
  registry.on({ kind: "layer" }, { wait: told.promise });
  const onProgress = ({ totalBytes, doneBytes }: Progress): void => {
    if (totalBytes > 0 && doneBytes === 0) told.open();
  };
  await new Puller({ url: reference, ...LINUX, onProgress }).pullTar(dest);
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

test("a partial of another image outlives a pull that gets nowhere, and is used by the next", async (t) => {
  const base = makeLayer({ seed: "kept", sizeBytes: 3 * MIB, compression: "none" });
  const [one, two] = ["1", "2"].map((seed) => makeImage({ seed, layers: [base, 70_000] }));
  const served = await serve(t, one as NonNullable<typeof one>);
  const { registry, reference, dest } = served;
  const last = one?.layers[1]?.digest as string;
  const gone = registry.on({ digest: last }, { status: 404 });
  await failure(pull(reference, dest, { concurrency: 1 }));
  gone.remove();
  const held = readFileSync(`${dest}.partial`);
  registry.add(two as NonNullable<typeof two>, "team/app", "1.0");
  const refused = registry.on({ kind: "layer" }, { status: 403 });
  writeFileSync(`${dest}.partial`, held.fill("x", 0, 512)); // no tar at the moment: nothing can be copied from it
  await failure(pull(reference, dest));
  assert.ok(readFileSync(`${dest}.partial.old`).equals(held));
  refused.remove();
  await pull(reference, dest);
  await assertRight(t, served, two as NonNullable<typeof two>);
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

test("a lock is its process's as long as that runs, however long it has slept", async (t) => {
  const image = makeImage({ seed: "sleeper", layers: [300_000] });
  const served = await serve(t, image);
  const held = gate();
  const pause = served.registry.on(
    { kind: "layer", times: 1 },
    { pause: { after: 100_000, until: held.promise } },
  );
  const first = startCommand([...OPTIONS, served.reference, served.dest]);
  await pause.reached;
  const minutesAgo = new Date(Date.now() - 120_000);
  utimesSync(`${served.dest}.partial.lock`, minutesAgo, minutesAgo);
  const second = await runCommand([...OPTIONS, served.reference, served.dest]);
  assert.equal(second.exitCode, 1);
  assert.match(second.stderr, /another imgpull/);
  held.open();
  const { exitCode, stderr } = await first.result;
  assert.equal(exitCode, 0, stderr);
  assert.ok(readFileSync(served.dest).equals(await undisturbedTar(t, image)));
});

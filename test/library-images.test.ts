// pullImages() as its user writes it: what it gives, what it refuses, callbacks that throw, and
// many calls at once.
import assert from "node:assert/strict";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { Writable } from "node:stream";
import { test } from "node:test";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import {
  ImgpullError,
  Puller,
  type PullerOpts,
  type PullOptions,
  type PullReport,
  pullImages,
} from "../imgpull.ts";
import { FIRST, IMAGES, serveBundle } from "./support/bundle.ts";
import { cleanEnvironment, SECRETS, temporaryFolder } from "./support/command.ts";
import { makeImage, makeMultiPlatform } from "./support/image.ts";
import { runMain } from "./support/main.ts";
import { blobBytes, blobsOf, failure } from "./support/pull.ts";
import { startRegistry } from "./support/registry.ts";

// The library reads process.env: a developer's proxies and credentials must not count here.
process.env = cleanEnvironment();

const AMD64 = { scheme: "http", platforms: ["linux/amd64"], retries: 0 } as const;

class Collector extends Writable {
  readonly chunks: Buffer[] = [];

  override _write(chunk: Buffer, _encoding: string, done: () => void): void {
    this.chunks.push(Buffer.from(chunk));
    done();
  }
}

// ====== What it gives ======

test("several images: plain data of each, and the bytes that the command writes", async (t) => {
  const { references, folder } = await serveBundle(t);
  const [first, second] = references;
  const dest = join(folder, "b.tar");
  const report = await pullImages([first, second, first], dest, AMD64);
  const images = [IMAGES[0], IMAGES[1]];
  const bytes = images.map((image) => (image ? blobBytes(image) : 0));
  const expected: PullReport = {
    images: images.map((image, at) => ({
      reference: references[at] ?? "",
      pinned: `${references[at]}@${image?.digest}`,
      name: references[at] ?? "",
      digest: image?.digest ?? "",
      platform: "linux/amd64",
      layers: image?.layers.length ?? 0,
    })),
    sizeBytes: statSync(dest).size,
    fetchedBytes: report.fetchedBytes,
    reusedBytes: 0,
    resumedBytes: 0,
    isUnchanged: false,
    omitted: [],
  };
  assert.deepEqual(report, expected);
  assert.ok(report.fetchedBytes <= (bytes[0] ?? 0) + (bytes[1] ?? 0) && report.fetchedBytes > 0);

  const other = join(folder, "c.tar");
  const args = [first, second, other, "-s", "http", "--platform", "linux/amd64"];
  const { exitCode, stdout } = await runMain(args);
  assert.equal(exitCode, 0);
  assert.equal(String(stdout), report.images.map(({ pinned }) => `${pinned}\n`).join(""));
  assert.ok(readFileSync(other).equals(readFileSync(dest)));
});

test("DEST is a file, a folder, or a stream, which gets the same bytes and is not ended", async (t) => {
  const { references, folder } = await serveBundle(t);
  const [first] = references;
  await pullImages([first], join(folder, "a.tar"), AMD64);
  const output = new Collector();
  await pullImages([first], output, AMD64);
  assert.ok(Buffer.concat(output.chunks).equals(readFileSync(join(folder, "a.tar"))));
  assert.equal(output.writableEnded, false);
  const { sizeBytes } = await pullImages([first], `${folder}/layout/`, AMD64);
  assert.ok(existsSync(join(folder, "layout/index.json")));
  assert.equal(sizeBytes, IMAGES[0] && blobBytes(IMAGES[0]));
});

test("options of the command that one image has too: reuse, since, name, platforms, and pullBlobs with reuse", async (t) => {
  const { references, folder, registry } = await serveBundle(t);
  const [first] = references;
  const old = join(folder, "old.tar");
  await pullImages([first], old, AMD64);
  registry.forget();
  const name = "registry.corp:5000/app:1";
  const opts: PullerOpts = { url: first, ...AMD64, reuse: [old], name };
  const result = await new Puller(opts).pullTar(join(folder, "new.tar"));
  assert.equal(result.name, name);
  assert.equal(result.fetchedBytes, 0);
  const delta = await pullImages([first], join(folder, "delta.tar"), { ...AMD64, since: old });
  assert.deepEqual(
    delta.omitted.map(({ digest }) => digest).sort(),
    IMAGES[0]?.layers.map(({ digest }) => digest).sort(),
  );

  registry.forget();
  const seen: number[] = [];
  const puller = new Puller({ ...opts, onProgress: ({ doneBytes }) => seen.push(doneBytes) });
  await puller.pullBlobs(await puller.pullManifest("image"), join(folder, "blobs"));
  assert.deepEqual(registry.blobRequests(), []);
  assert.equal(
    readdirSync(join(folder, "blobs")).length,
    blobsOf(IMAGES[0] ?? assert.fail()).length,
  );
  assert.equal(seen.at(-1), IMAGES[0] && blobBytes(IMAGES[0]));

  await pullImages([first], join(folder, "all.tar"), { scheme: "http", platforms: "all" });
  checkTarOfAll(readFileSync(join(folder, "all.tar")));
  await assert.rejects(pullImages([first, references[1]], "x.tar", opts), { code: "BAD_OPTION" });
});

function checkTarOfAll(tar: Buffer): void {
  for (const { digest } of FIRST.children) assert.ok(tar.includes(digest.slice(7)), digest);
}

// ====== Names in the tar ======

const RENAMES: [renames: Record<string, string>, image: string, name: string | RegExp][] = [
  [{ "docker.io": "registry.corp/hub" }, "alpine:3", "registry.corp/hub/library/alpine:3"],
  [{ "docker.io/library": "registry.corp" }, "alpine:3", "registry.corp/alpine:3"],
  [{ "docker.io/library/alpine": "r.corp/base" }, "alpine:3", "r.corp/base:3"],
  [{ "docker.io": "a.corp", "docker.io/library": "b.corp" }, "alpine", "b.corp/alpine:latest"],
  [{ "docker.io/lib": "registry.corp" }, "alpine:3", "docker.io/library/alpine:3"],
  [{ localhost: "registry.corp" }, "localhost:5000/app:1", "localhost:5000/app:1"],
  [{ "localhost:5000": "quay.io" }, "localhost:5000/app:1", "quay.io/app:1"],
  [{ "quay.io": "docker.io" }, "quay.io/org/app:1", "docker.io/org/app:1"],
  [{ "docker.io": "Registry.corp/HUB" }, "alpine:3", /`renames`.*lower case/],
];

test("renames: whole path segments, the longest wins, and a name that cannot be is refused", async (t) => {
  const image = makeImage({ seed: "renames", platform: "linux/amd64" });
  const registry = await startRegistry({}, t);
  for (const [renames, reference, expected] of RENAMES) {
    const [, repository = ""] = /^(?:[^/]*[.:][^/]*\/)?([^:]*)/.exec(reference) ?? [];
    const path =
      repository.includes("/") || /[.:].*\//.test(reference) ? repository : `library/${repository}`;
    const url = registry.add(image, path, "1");
    // The registry on loopback stands for the host: its name is what --ns gives.
    const host = /^([^/]*[.:][^/]*)\//.exec(reference)?.[1] ?? "docker.io";
    const options = { ...AMD64, dryRun: true, namespace: host, renames };
    const version = /:([^:/]*)$/.exec(reference)?.[1] ?? "latest";
    registry.add(image, path, version);
    const asked = url.replace(/:1$/, `:${version}`);
    if (expected instanceof RegExp) {
      await assert.rejects(pullImages([asked], undefined, options), {
        code: "BAD_OPTION",
        message: expected,
      });
      continue;
    }
    const { images } = await pullImages([asked], undefined, options);
    assert.equal(images[0]?.name, expected, JSON.stringify(renames));
    assert.equal(images[0]?.pinned, `${asked}@${image.digest}`);
  }
});

test("--rename: names in the tar, the source in the lock line, and a word where nothing begins so", async (t) => {
  const { references, folder } = await serveBundle(t);
  const [first] = references;
  const [host = ""] = first.split("/");
  const dest = join(folder, "a.tar");
  const words = [first, dest, "-s", "http", "--platform", "linux/amd64", "-q"];
  const renamed = ["--rename", `${host}=registry.corp/hub`, "--rename", "quay.io=x.corp"];
  const { exitCode, stdout, stderr } = await runMain([...words, ...renamed]);
  assert.equal(exitCode, 0, stderr);
  assert.equal(stderr, "imgpull: --rename: no name begins with quay.io\n");
  assert.equal(String(stdout), `${first}@${IMAGES[0]?.digest}\n`);
  const name = first.replace(host, "registry.corp/hub");
  assert.ok(readFileSync(dest).includes(`"RepoTags":["${name}"]`));
  for (const bad of ["a", "=b", "a=", "a=b=c"]) {
    const refused = await runMain([...words, "--rename", bad]);
    assert.equal(refused.exitCode, 2);
    assert.match(refused.stderr, /^imgpull: --rename is FROM=TO, not ".*\n$/);
  }
  const both = await runMain([...words, ...renamed, "--name", "x:1"]);
  assert.match(both.stderr, /--name and --rename exclude/);
});

// ====== Dry runs ======

test("--dry-run prints the lock lines, says what would come, and writes nothing", async (t) => {
  const { references, folder, registry } = await serveBundle(t);
  const [first, second] = references;
  const dest = join(folder, "b.tar");
  const words = ["-s", "http", "--platform", "linux/amd64"];
  const dry = await runMain([first, second, dest, ...words, "--dry-run"]);
  assert.equal(dry.exitCode, 0, dry.stderr);
  assert.equal(registry.blobRequests().length, 0);
  assert.deepEqual(readdirSync(folder), []);

  const wet = await runMain([first, second, dest, ...words]);
  assert.equal(String(dry.stdout), String(wet.stdout));
  const size = /2 images, (\S+ \S+) in/;
  assert.equal(size.exec(dry.stderr)?.[1], size.exec(wet.stderr)?.[1]);
  assert.match(dry.stderr, /^imgpull: dry run: 2 images, .* in .*b\.tar: \d.* to fetch\n$/);

  // Without DEST there is nothing to compare with; with it, what it holds need not come.
  const list = { stdin: `${first}\n${second}\n` };
  const free = await runMain(["--from", "-", ...words, "--dry-run"], list);
  assert.equal(String(free.stdout), String(wet.stdout));
  assert.match(free.stderr, /in all/);
  const again = await pullImages([first, second], dest, { ...AMD64, dryRun: true });
  assert.equal(again.fetchedBytes, 0);
  assert.ok(again.reusedBytes > 0);
  assert.deepEqual(readdirSync(folder), ["b.tar"]);
  const reused = await pullImages([first], `${folder}/new/`, {
    ...AMD64,
    dryRun: true,
    reuse: [dest],
  });
  assert.deepEqual([reused.fetchedBytes, existsSync(join(folder, "new"))], [0, false]);
  await assert.rejects(pullImages([first], undefined, AMD64), {
    code: "BAD_OPTION",
    message: /dest/,
  });
});

test("--dry-run of a folder counts what is there, and finds that a tag has moved", async (t) => {
  const { references, folder, registry } = await serveBundle(t);
  const [first] = references;
  const layout = join(folder, "layout");
  mkdirSync(layout);
  await pullImages([first], layout, AMD64);
  const same = await pullImages([first], layout, { ...AMD64, dryRun: true });
  assert.equal(same.fetchedBytes, 0);
  const lock = same.images.map(({ pinned }) => pinned);
  const [, repository = "", tag = ""] = /^[^/]*\/(.*):(.*)$/.exec(first) ?? [];
  registry.add(makeImage({ seed: "moved", platform: "linux/amd64" }), repository, tag);
  const moved = await pullImages([first], layout, { ...AMD64, dryRun: true });
  assert.notDeepEqual(
    moved.images.map(({ pinned }) => pinned),
    lock,
  );
  assert.ok(moved.fetchedBytes > 0);
});

// ====== What it refuses ======

const REFUSED: [options: Record<string, unknown>, says: RegExp][] = [
  [{ plattforms: ["linux/amd64"] }, /unknown option `plattforms`: did you mean `platforms`\?/],
  [{ userName: "x" }, /unknown option `userName`: did you mean `username`\?/],
  [{ zzz: 1 }, /unknown option `zzz`$/],
  [{ url: 5 }, /`url` has to be a string/],
  [{ concurrency: "8" }, /`concurrency` has to be a number/],
  [{ concurrency: 65 }, /`concurrency` is a whole number from 1 to 64, not 65/],
  [{ timeoutMs: 0.5 }, /`timeoutMs` is a whole number/],
  [{ insecure: "no" }, /`insecure` has to be true or false/],
  [{ platforms: "linux/amd64" }, /`platforms` has to be "all" or a list/],
  [{ platforms: [] }, /`platforms` is an empty list/],
  [{ platforms: ["linux"] }, /`platforms`: "linux" is not OS\/ARCH/],
  [{ platforms: ["linux/amd64"], osType: "linux" }, /`platforms` excludes `osType`/],
  [{ reuse: "old.tar" }, /`reuse` has to be a list of strings/],
  [{ renames: { a: 1 } }, /`renames` has to be an object of strings/],
  [{ renames: ["a=b"] }, /`renames` has to be an object/],
  [{ name: "a:1", renames: { a: "b" } }, /`name` and `renames` exclude/],
  [{ name: `a:1@sha256:${"0".repeat(64)}` }, /`name` is NAME or NAME:TAG/],
  [{ signal: {} }, /`signal` has to be an AbortSignal/],
  [{ onProgress: true }, /`onProgress` has to be a function/],
  [{ environment: "PATH" }, /`environment` has to be an object/],
  [{ username: "x" }, /`username` needs `password`/],
  [{ password: SECRETS.password }, /`password` needs `username`/],
  [{ password: [SECRETS.password] }, /`password` has to be a string$/],
  [{ caCert: "a\0b" }, /`caCert` has a NUL character/],
  [{ reuse: ["a.tar", "a\0b"] }, /`reuse` has a NUL character/],
  [{ tlsCert: "a" }, /`tlsCert` and `tlsKey` go together/],
];

test("options are refused by name and kind, and never show a value that may be a secret", async () => {
  for (const [options, says] of REFUSED) {
    const opts = { url: "alpine", ...options } as unknown as PullerOpts;
    const label = JSON.stringify(options);
    assert.throws(() => new Puller(opts), { code: "BAD_OPTION", message: says }, label);
    const { url: _, ...rest } = opts;
    if ("url" in options) continue;
    const error = await failure(pullImages(["alpine"], "a.tar", rest as PullOptions));
    assert.deepEqual([error.code, says.test(error.message)], ["BAD_OPTION", true], label);
    assert.ok(!error.message.includes(SECRETS.password));
  }
  const nothing = {} as PullerOpts;
  assert.throws(() => new Puller(nothing), { code: "BAD_OPTION", message: /`url` is missing/ });
  for (const strange of [undefined, null, 5] as unknown as PullerOpts[])
    assert.throws(() => new Puller(strange), { name: "ImgpullError", code: "BAD_OPTION" });
  const list = "alpine" as unknown as string[];
  assert.equal((await failure(pullImages(list, "a.tar"))).code, "BAD_OPTION");
  assert.equal((await failure(pullImages([], "a.tar"))).code, "BAD_REFERENCE");
  for (const dest of [undefined, "", "a\0b", 5, null, {}] as unknown as string[]) {
    const error = await failure(pullImages(["alpine"], dest));
    assert.match(error.message, /`dest` has to be a path or a Writable/, String(dest));
  }
  for (const holder of [undefined, {}, { bytes: "{}" }] as never[]) {
    const error = await failure(new Puller("alpine").pullBlobs(holder, "blobs"));
    assert.deepEqual([error.code, /`holder`/.test(error.message)], ["BAD_OPTION", true]);
  }
  for (const platforms of ["all", ["linux/amd64", "linux/arm64"]] as const) {
    const error = await failure(new Puller({ url: "alpine", platforms }).pullManifest("image"));
    assert.deepEqual([error.code, /`platforms`/.test(error.message)], ["BAD_OPTION", true]);
  }
  assert.equal((await failure(pullImages(["Alpine"], "a.tar"))).code, "BAD_REFERENCE");
});

test("undefined is as if an option was not there", async (t) => {
  const { references, folder } = await serveBundle(t);
  const names = ["username", "password", "token", "reuse", "signal", "onProgress", "renames"];
  const blank = Object.fromEntries(names.map((name) => [name, undefined])) as PullOptions;
  const { images } = await pullImages([references[0]], join(folder, "a.tar"), {
    ...AMD64,
    ...blank,
  });
  assert.equal(images.length, 1);
});

// ====== Callbacks that throw, signals ======

const THROWING: [name: string, options: (reason: Error) => PullOptions][] = [
  ["onProgress at once", (reason) => ({ onProgress: throwing(reason) })],
  ["onProgress when bytes come", (reason) => ({ onProgress: throwing(reason, "fetch") })],
  ["onProgress at the end", (reason) => ({ onProgress: throwing(reason, "finish") })],
  ["onProgress, later", (reason) => ({ onProgress: async () => Promise.reject(reason) })],
  ["onWarning", (reason) => ({ onWarning: throwing(reason), renames: { "quay.io": "x.corp" } })],
];

function throwing(reason: Error, phase?: string): (argument: unknown) => void {
  return (argument) => {
    const isDue = phase === undefined || (argument as { phase: string }).phase === phase;
    if (isDue) throw reason;
  };
}

for (const [name, optionsFor] of THROWING) {
  test(`${name}: what a callback throws ends the call, and nothing is left open`, async (t) => {
    const { references, folder, registry } = await serveBundle(t);
    const unhandled: unknown[] = [];
    const note = (reason: unknown) => unhandled.push(reason);
    process.on("unhandledRejection", note);
    t.after(() => process.off("unhandledRejection", note));
    const reason = new Error("of the caller's own");
    const dest = join(folder, "a.tar");
    const pulling = pullImages([references[0]], dest, { ...AMD64, ...optionsFor(reason) });
    await assert.rejects(pulling, (error) => error === reason);
    await registry.settled();
    assert.ok(!existsSync(`${dest}.partial.lock`));
    await new Promise(setImmediate);
    assert.deepEqual(unhandled, []);
  });
}

test("signal: its reason is the cause of ABORTED, for each call, and nothing is asked for after it", async (t) => {
  const { references, folder, registry } = await serveBundle(t);
  const reason = new Error("the user closed the window");
  const signal = AbortSignal.abort(reason);
  const opts: PullerOpts = { url: references[0], ...AMD64, signal };
  const puller = new Puller(opts);
  const holder = await new Puller({ ...opts, signal: undefined }).pullManifest("image");
  registry.forget();
  const calls: Record<string, () => Promise<unknown>> = {
    pullImages: () => pullImages([references[0]], join(folder, "a.tar"), { ...AMD64, signal }),
    pullTar: () => puller.pullTar(join(folder, "a.tar")),
    pullManifest: () => puller.pullManifest("list"),
    getManifest: () => puller.getManifest(),
    headManifest: () => puller.headManifest(),
    pullBlobs: () => puller.pullBlobs(holder, join(folder, "blobs")),
  };
  for (const [name, call] of Object.entries(calls)) {
    const error = await failure(call());
    assert.deepEqual([error.code, error.cause], ["ABORTED", reason], name);
  }
  assert.equal(registry.requests.length, 0);
  assert.deepEqual(readdirSync(folder), []);
});

// ====== Many calls ======

const openFiles = (): number => readdirSync("/proc/self/fd").length;
const isCounted = existsSync("/proc/self/fd") && typeof globalThis.gc !== "function";

test("300 pulls in one process, half of them aborted at random: nothing grows", async (t) => {
  const image = makeMultiPlatform(["linux/amd64"], { seed: "many", layers: [300_000, 20_000] });
  const registry = await startRegistry({}, t);
  const url = registry.add(image, "team/app", "1.0");
  const folder = temporaryFolder(t);
  const shared = new AbortController(); // one that lives as long as the program
  const listeners = countListeners(shared.signal);
  let seed = 42;
  const random = () => {
    seed = (seed * 1_103_515_245 + 12_345) % 2_147_483_648;
    return seed / 2_147_483_648;
  };
  const counts = { done: 0, aborted: 0 };

  const one = async (round: number) => {
    const own = new AbortController();
    const isAborted = round % 2 === 1;
    let left = Math.floor(random() * 6);
    const onProgress = () => {
      left -= 1;
      if (isAborted && left < 0) own.abort();
    };
    const signal = isAborted ? own.signal : shared.signal;
    const dest = join(folder, `${round % 10}.tar`);
    try {
      await pullImages([url], dest, { ...AMD64, signal, onProgress });
      counts.done += 1;
    } catch (error) {
      assert.ok(error instanceof ImgpullError && error.code === "ABORTED", String(error));
      counts.aborted += 1;
    }
  };

  for (let round = 0; round < 40; round += 1) await one(round);
  await registry.settled();
  const before = { files: openFiles(), timers: resources(), heap: heapInUse() };
  for (let round = 40; round < 340; round += 1) await one(round);
  await registry.settled();
  assert.ok(counts.done >= 170 && counts.aborted >= 100, JSON.stringify(counts));
  if (isCounted) assert.ok(openFiles() <= before.files + 2, `${openFiles()} of ${before.files}`);
  assert.ok(resources() <= before.timers + 2, process.getActiveResourcesInfo().join());
  assert.equal(listeners(), 0);
  const grownMib = (heapInUse() - before.heap) / 2 ** 20;
  assert.ok(grownMib < 12, `${grownMib} MiB`);
});

/** Without what only waits to be collected. */
function heapInUse(): number {
  setFlagsFromString("--expose-gc");
  runInNewContext("gc")();
  return process.memoryUsage().heapUsed;
}

const resources = (): number =>
  process.getActiveResourcesInfo().filter((name) => /Timeout|Socket|TCP|FSReq/i.test(name)).length;

/** How many listeners there are, by what is added and taken off. */
function countListeners(signal: AbortSignal): () => number {
  let count = 0;
  const add = signal.addEventListener.bind(signal);
  const remove = signal.removeEventListener.bind(signal);
  signal.addEventListener = (...args: Parameters<typeof add>) => {
    count += 1;
    add(...args);
  };
  signal.removeEventListener = (...args: Parameters<typeof remove>) => {
    count -= 1;
    remove(...args);
  };
  return () => count;
}

// Chance against the promises of the front page: odd peers, mutated tars, runs that are killed,
// stopped and started on top of each other. Each part runs for its share of IMGPULL_STORM_SECONDS
// (4 at a developer's, 60 in CI) from a fresh seed; what it prints on a failure, `IMGPULL_SEED=…`,
// does the same again.
import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Writable } from "node:stream";
import { type TestContext, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import { ImgpullError, verifyTar } from "../imgpull.ts";
import { type CommandResult, secretForms, startCommand } from "./support/command.ts";
import {
  digestOf,
  makeImage,
  makeLayer,
  makeMultiPlatform,
  readTar,
  type TestContent,
} from "./support/image.ts";
import { NAME, type PullOptions, pull, serve, undisturbedTar } from "./support/pull.ts";
import { Random } from "./support/random.ts";
import type { Fault, Matcher, Registry } from "./support/registry.ts";

const SEED = process.env.IMGPULL_SEED ?? String(Math.floor(Math.random() * 1e9));
const SECONDS = Number(process.env.IMGPULL_STORM_SECONDS ?? "4");
console.log(`storm: IMGPULL_SEED=${SEED} for ${SECONDS} s`);

/**
 * Rounds until its share of the time is over, at least two; each from a seed of its own, which a
 * failure names.
 */
async function storm(
  t: TestContext,
  share: number,
  round: (random: Random, number: number) => Promise<string>,
): Promise<void> {
  const endsAt = Date.now() + share * SECONDS * 1000;
  const outcomes = new Map<string, number>();
  for (let number = 0; number < 2 || Date.now() < endsAt; number += 1) {
    try {
      const outcome = await round(new Random(`${SEED} ${t.name} ${number}`), number);
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
    } catch (error) {
      const where = `IMGPULL_SEED=${SEED}, round ${number} of "${t.name}"`;
      throw new Error(`${where}: ${(error as Error).message}`, { cause: error });
    }
  }
  const counts = [...outcomes].map(([outcome, count]) => `${outcome} ${count}`);
  t.diagnostic(counts.sort().join(", "));
}

// ====== Peers ======

const APP = makeMultiPlatform(["linux/amd64", "linux/arm64"], {
  seed: "storm",
  layers: [2_000_000, 90_000, 4000],
});
const KINDS = ["manifest", "config", "layer", "blob", "token"] as const;
const STATUSES = [200, 204, 206, 301, 302, 307, 400, 401, 403, 404, 408, 416, 425, 429, 500, 503];
const TYPES = [
  "text/html",
  "application/json",
  "",
  "application/vnd.oci.image.index.v1+json",
  "a/b; c",
];

/** Bytes with some of them changed, cut off, doubled or put in. */
function mutate(random: Random, bytes: Buffer): Buffer {
  const at = random.integer(0, bytes.length + 1);
  const head = bytes.subarray(0, at);
  const tail = bytes.subarray(at);
  const changed = Buffer.from(bytes);
  if (changed.length > 0) changed[random.integer(0, changed.length)] = random.integer(0, 256);
  const junk = Buffer.from(
    random.pick(["\0", "{", '"', "[".repeat(999), "1e999", "-1", "null,", "\u202e"]),
  );
  return random.pick([
    changed,
    head,
    tail,
    Buffer.concat([head, junk, tail]),
    Buffer.concat([bytes, bytes]),
  ]);
}

function anyFault(random: Random, content: Buffer): Fault {
  const at = random.integer(0, content.length + 1);
  const headers: Fault["headers"] = random.pick([
    { "content-type": random.pick(TYPES) },
    { "content-length": null },
    {
      "content-range": random.pick([
        "bytes 0-1/2",
        "bytes */0",
        `bytes ${at}-${at}/${at}`,
        "x",
        "",
      ]),
    },
    { "docker-content-digest": random.pick(["sha256:00", "", `sha256:${"0".repeat(64)}`]) },
    {
      "retry-after": random.pick(["0", "1", "-1", "9999999", "Thu, 01 Jan 1970 00:00:00 GMT", "x"]),
    },
    { location: random.pick(["", "/", "ftp://x", "http://127.0.0.1:1/", "//", "?", "http://[::"]) },
    {
      "www-authenticate": random.pick([
        "",
        "Bearer",
        'Bearer realm="',
        "Basic",
        "Negotiate",
        "=,=",
        "\u00e9",
      ]),
    },
  ]);
  return random.pick<Fault>([
    { reset: true },
    { status: random.pick(STATUSES) },
    { status: random.pick(STATUSES), headers },
    { status: 200, body: mutate(random, content) },
    {
      body: mutate(random, content),
      contentLength: random.pick(["chunked", "close", 5, -5] as const),
    },
    { headers },
    { dropAfter: at },
    { dropAt: at },
    { stallAfter: at },
    { corruptAt: at },
    { contentLength: random.pick(["chunked", "close", 1, -1, 1000] as const) },
    { ignoreRange: true },
    { contentEncoding: "gzip" },
    { redirect: random.pick(["storage", "self", "/", "http://127.0.0.1:1/x"]) },
    { ignoreRange: true, dropAfter: at },
  ]);
}

/** Some rules at random; some of them hold once only, so that many pulls end well after all. */
function plantFaults(random: Random, registry: Registry, content: TestContent): void {
  const blobs = [
    ...content.blobs.values(),
    ...[...content.manifests.values()].map(({ bytes }) => bytes),
  ];
  for (let left = random.integer(1, 5); left > 0; left -= 1) {
    const matcher: Matcher = { kind: random.pick(KINDS), skip: random.integer(0, 3) };
    if (random.chance(0.7)) matcher.times = random.integer(1, 4);
    if (random.chance(0.3)) matcher.ranged = random.chance(0.5);
    const fault = anyFault(random, random.pick(blobs));
    // A tag may well lead to another manifest: nobody could tell that from a fault.
    const isManifest = matcher.kind === "manifest" && fault.body !== undefined;
    if (isManifest) matcher.where = ({ reference }) => reference.startsWith("sha256:");
    registry.on(matcher, fault);
  }
}

function assertNoSecret(text: string): void {
  for (const form of secretForms()) assert.ok(!text.includes(form), text);
}

class Collector extends Writable {
  readonly #chunks: Buffer[] = [];

  override _write(chunk: Buffer, _encoding: string, done: () => void): void {
    this.#chunks.push(Buffer.from(chunk));
    done();
  }

  get bytes(): Buffer {
    return Buffer.concat(this.#chunks);
  }
}

/** One kind of DEST: what has to be so after a pull that went well, and after one that did not. */
interface Kind {
  dest: string | Collector;
  assertDone: () => void;
  assertFailed: () => void;
}

const KINDS_OF_DEST: ((random: Random, folder: string, right: Buffer) => Kind)[] = [
  function file(random, folder, right) {
    const dest = join(folder, "app.tar");
    const before = random.chance(0.5) ? Buffer.from("precious") : undefined;
    if (before) writeFileSync(dest, before);
    return {
      dest,
      assertDone: () => assert.ok(readOptional(dest)?.equals(right), "DEST is another"),
      assertFailed: () => assert.deepEqual(readOptional(dest), before, "DEST was touched"),
    };
  },
  function layout(_random, folder) {
    const dest = join(folder, "layout/");
    return {
      dest,
      assertDone: () => assert.equal(namedIn(dest).length, 1),
      assertFailed: () => assert.deepEqual(namedIn(dest), []),
    };
  },
  function stream(_random, _folder, right) {
    const dest = new Collector();
    return {
      dest,
      assertDone: () => assert.ok(dest.bytes.equals(right), "the stream is another"),
      assertFailed: () => assert.throws(() => readTar(dest.bytes), "it looks whole"),
    };
  },
];

/** What the index of a layout names. Whatever has a blob's own name has its digest. */
function namedIn(layout: string): string[] {
  const blobs = join(layout, "blobs/sha256");
  const files = existsSync(blobs) ? readdirSync(blobs) : [];
  for (const name of files.filter((file) => /^[0-9a-f]{64}$/.test(file)))
    assert.equal(digestOf(readFileSync(join(blobs, name))), `sha256:${name}`);
  const index = readOptional(join(layout, "index.json"));
  if (!index) return [];
  const { manifests } = JSON.parse(String(index)) as { manifests: { digest: string }[] };
  for (const { digest } of manifests) assert.ok(files.includes(digest.slice("sha256:".length)));
  return manifests.map(({ digest }) => digest);
}

test("whatever peers answer: DEST is right or as it was, and failures are told in words", async (t) => {
  const right = await undisturbedTar(t, APP);
  await storm(t, 0.35, async (random) => {
    const served = await serve(t, APP, random.chance(0.3) ? { auth: "bearer" } : {});
    const { registry, reference, folder } = served;
    plantFaults(random, registry, APP);
    const { dest, assertDone, assertFailed } = random.pick(KINDS_OF_DEST)(random, folder, right);
    const options: PullOptions = {
      retries: random.integer(0, 4),
      concurrency: random.integer(1, 9),
      timeoutMs: 150,
      signal: AbortSignal.timeout(20_000),
    };
    if (random.chance(0.3)) {
      const lying = join(folder, "at-hand.tar");
      writeFileSync(lying, mutateTar(random, right));
      options.reuse = [lying];
    }
    let outcome = "done";
    try {
      await pull(reference, dest, options);
    } catch (error) {
      if (!(error instanceof ImgpullError)) throw error;
      assertNoSecret(error.message);
      assert.notEqual(error.code, "ABORTED", "it went on for 20 s");
      outcome = error.code;
    }
    if (outcome === "done") assertDone();
    else assertFailed();

    // What is left beside it is gone on with, once the peers behave.
    await registry.close();
    const again = await serve(t, APP);
    if (typeof dest === "string") {
      await pull(again.reference, dest);
      assertDone();
    }
    await again.registry.close();
    rmSync(folder, { recursive: true, force: true });
    return outcome;
  });
});

function readOptional(file: string): Buffer | undefined {
  try {
    return readFileSync(file);
  } catch {
    return undefined;
  }
}

// ====== Tars ======

const SMALL = makeImage({ seed: "storm tar", layers: [9000, 4000] });

/**
 * A tar in which some bytes are others, most of them where they count: in headers and documents.
 */
function mutateTar(random: Random, tar: Buffer): Buffer {
  const bytes = Buffer.from(tar);
  for (let left = random.integer(1, 4); left > 0; left -= 1) {
    const block = 512 * random.integer(0, Math.floor(bytes.length / 512));
    bytes[block + random.integer(0, 512)] = random.integer(0, 256);
    if (random.chance(0.5)) setChecksum(bytes.subarray(block, block + 512)); // else only the checksum is seen to be wrong
  }
  if (random.chance(0.1)) return bytes.subarray(0, random.integer(0, bytes.length));
  if (random.chance(0.1)) return Buffer.concat([bytes, bytes]);
  return bytes;
}

function setChecksum(header: Buffer): void {
  header.write(" ".repeat(8), 148);
  const sum = header.reduce((total, byte) => total + byte, 0);
  header.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148);
}

test("mutated tars: refused in words, or what they say is still what was pulled", async (t) => {
  const { reference, dest, registry } = await serve(t, SMALL);
  await pull(reference, dest);
  await registry.close();
  const tar = readFileSync(dest);
  await storm(t, 0.15, async (random) => {
    writeFileSync(dest, mutateTar(random, tar));
    try {
      const { images } = await verifyTar(dest);
      for (const { digest } of images) assert.equal(digest, SMALL.digest);
      return "right";
    } catch (error) {
      if (!(error instanceof ImgpullError)) throw error;
      assert.equal(error.code, "BAD_TAR", error.message);
      assert.doesNotMatch(error.message, /[^\P{Cc}\n]|\u202e/u);
      return "refused";
    }
  });
});

// ====== Runs that are killed, stopped, and on top of each other ======

const VERSIONS = [1, 2].map((version) =>
  makeMultiPlatform(["linux/amd64"], {
    seed: `storm v${version}`,
    layers: [
      makeLayer({ seed: "storm base", sizeBytes: 3_000_000, compression: "none" }),
      makeLayer({ seed: `storm v${version}`, sizeBytes: 400_000, compression: "none" }),
    ],
  }),
);
const OPTIONS = ["--scheme", "http", "--platform", "linux/amd64", "--name", NAME, "-q"];

/** The line is slow enough for a signal to come before the end. */
function slowDown(registry: Registry): void {
  registry.on(
    { kind: "layer" },
    {
      handler: async (_request, response, next) => {
        const write = response.write.bind(response) as (chunk: Buffer) => boolean;
        let sentBytes = 0;
        response.write = ((chunk: Buffer) => {
          sentBytes += chunk.length;
          if (sentBytes % 500_000 < chunk.length) {
            setTimeout(() => response.emit("drain"), 10);
            write(chunk);
            return false;
          }
          return write(chunk);
        }) as typeof response.write;
        await next();
      },
    },
  );
}

/** One run with a fate: it may be killed, interrupted, or stopped for a while. */
async function runWithFate(random: Random, args: string[]): Promise<CommandResult> {
  await pause(random.integer(0, 150));
  const { child, result } = startCommand([...OPTIONS, ...args], { guardMs: 30_000 });
  const fate = random.pick(["none", "none", "SIGKILL", "SIGINT", "SIGSTOP"] as const);
  if (fate !== "none") {
    await Promise.race([pause(random.integer(20, 400)), result]);
    child.kill(fate);
  }
  if (fate === "SIGSTOP") {
    await pause(random.integer(50, 400));
    child.kill("SIGCONT");
  }
  return result;
}

test("runs killed, stopped and on top of each other: exit 0 means that DEST is right", async (t) => {
  const tars = await Promise.all(VERSIONS.map((version) => undisturbedTar(t, version)));
  await storm(t, 0.5, async (random, number) => {
    const served = await serve(t, VERSIONS[0] as TestContent);
    const { registry, reference, dest, folder } = served;
    slowDown(registry);
    const runs = Array.from({ length: random.integer(1, 4) }, () =>
      runWithFate(random, [reference, dest]),
    );
    if (random.chance(0.5)) {
      await pause(random.integer(0, 300));
      registry.add(VERSIONS[1] as TestContent, "team/app", "1.0"); // the tag moves meanwhile
    }
    const results = await Promise.all(runs);
    const isRight = () => tars.some((tar) => readOptional(dest)?.equals(tar));
    for (const { exitCode, stderr } of results) {
      assert.doesNotMatch(stderr, /^\s+at .*:\d+:\d+/m, "a stack trace");
      if (exitCode === 0) assert.ok(isRight(), "exit 0, and DEST is another");
    }
    assert.ok(readOptional(dest) === undefined || isRight(), "something else has DEST's name");

    registry.add(VERSIONS[number % 2] as TestContent, "team/app", "1.0");
    const last = await startCommand([...OPTIONS, reference, dest], { guardMs: 90_000 }).result;
    assert.equal(last.exitCode, 0, last.stderr);
    assert.ok(readFileSync(dest).equals(tars[number % 2] as Buffer), "the last run's is another");
    await registry.close();
    rmSync(folder, { recursive: true, force: true });
    const endings = results.map(({ exitCode, signal }) => signal ?? `exit ${exitCode}`);
    return [...new Set(endings)].sort().join("+");
  });
});

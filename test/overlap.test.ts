// Two pulls to one DEST, stopped before any step that they take on the disk, in any order: what a
// run gives DEST's name is its own tar, whole and right, whatever the other does, and both never
// lose. The steps are those of node:fs/promises; the runs share a process, and believe to be in two
// namespaces of one host.
import assert from "node:assert/strict";
import { AsyncLocalStorage } from "node:async_hooks";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import promises from "node:fs/promises";
import { syncBuiltinESMExports } from "node:module";
import { basename, dirname, join } from "node:path";
import { type TestContext, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { ImgpullError } from "../imgpull.ts";
import { runCommand, startCommand, temporaryFolder } from "./support/command.ts";
import { digestOf, makeImage, type TestImage } from "./support/image.ts";
import { OPTIONS } from "./support/interrupt.ts";
import { blobName, failure, pull, undisturbedTar } from "./support/pull.ts";
import { gate, type Registry, type Rule, startRegistry } from "./support/registry.ts";

// ====== Actors and their steps ======

class Actor {
  readonly name: string;
  readonly steps: string[] = [];
  /** It stops before the step of this number, until it is let go. */
  #stopAt = Number.POSITIVE_INFINITY;
  #stopped = gate();
  #goOn = gate();

  constructor(name: string, stopAt: number) {
    this.name = name;
    this.#stopAt = stopAt;
  }

  get isAtStop(): Promise<void> {
    return this.#stopped.promise;
  }

  release(): void {
    this.#goOn.open();
  }

  async step(what: string): Promise<void> {
    this.steps.push(what);
    if (this.steps.length !== this.#stopAt + 1) return;
    this.#stopped.open();
    await this.#goOn.promise;
  }
}

const running = new AsyncLocalStorage<Actor>();

/** What an actor gives DEST's name is looked at there and then. */
let checkRename: (actor: Actor, from: string, to: string) => void = () => undefined;

type Asynchronous = (...args: unknown[]) => Promise<unknown>;

/** Steps on these paths are steps; what one reads of the system is not. */
const isWatched = (path: unknown): path is string =>
  typeof path === "string" && path.includes("imgpull-test-");

function watchFileSystem(t: TestContext): void {
  const original = { ...promises } as unknown as Record<string, Asynchronous>;
  const replaced = promises as unknown as Record<string, Asynchronous>;
  const replace = (name: string, make: (before: Asynchronous) => Asynchronous) => {
    replaced[name] = make(original[name] as Asynchronous);
  };
  for (const name of ["open", "rename", "link", "unlink", "lstat", "copyFile", "chmod"]) {
    replace(name, (before) => async (...args) => {
      const actor = running.getStore();
      if (!actor || !isWatched(args[0])) return before(...args);
      await actor.step(`${name} ${basename(args[0])}`);
      if (name === "rename") checkRename(actor, String(args[0]), String(args[1]));
      return before(...args);
    });
  }
  replace("readlink", (before) => async (...args) => {
    const actor = running.getStore();
    return actor && args[0] === "/proc/self/ns/pid" ? `pid:[${actor.name}]` : before(...args);
  });
  syncBuiltinESMExports();
  t.after(() => {
    Object.assign(promises, original);
    syncBuiltinESMExports();
  });
}

// ====== One run of both ======

interface Scene {
  registry: Registry;
  folder: string;
  dest: string;
  images: Readonly<Record<string, TestImage>>;
  references: Readonly<Record<string, string>>;
}

interface Stops {
  first: number;
  second: number;
  /** The first sleeps for longer than a lock lives. */
  isLong: boolean;
}

interface Ending {
  actor: Actor;
  error: ImgpullError | undefined;
}

function start(scene: Scene, name: string, stopAt: number) {
  const actor = new Actor(name, stopAt);
  const named = scene.dest.endsWith("/") ? { name: nameOf(name) } : {}; // in a tar that is compared all are NAME
  const options = { signal: AbortSignal.timeout(30_000), ...named };
  const pulling = running.run(actor, () => pull(scene.references[name] ?? "", scene.dest, options));
  const ending = pulling.then(
    (): Ending => ({ actor, error: undefined }),
    (error: unknown): Ending => {
      if (!(error instanceof ImgpullError)) throw error;
      return { actor, error };
    },
  );
  return { actor, ending, atStopOrEnd: Promise.race([actor.isAtStop, ending]) };
}

const nameOf = (actor: string): string => `example.com/team/${actor}:1.0`;

function lockOf(dest: string): string {
  return dest.endsWith("/") ? join(dest, ".imgpull.partial.lock") : `${dest}.partial.lock`;
}

/**
 * The first up to its stop, the second up to its stop, the first to its end, the second to its end.
 */
async function play(scene: Scene, { first, second, isLong }: Stops): Promise<[Ending, Ending]> {
  const one = start(scene, "first", first);
  await one.atStopOrEnd;
  const lock = lockOf(scene.dest);
  const longAgo = new Date(Date.now() - 90_000);
  if (isLong && existsSync(lock)) utimesSync(lock, longAgo, longAgo);

  const two = start(scene, "second", second);
  await two.atStopOrEnd;
  one.actor.release();
  const ended = await one.ending;
  two.actor.release();
  return [ended, await two.ending];
}

// ====== Stories ======

const A = makeImage({ seed: "overlap-a", layers: [8_000] });
const B = makeImage({ seed: "overlap-b", layers: [6_000] });

interface Story {
  second: TestImage;
  isLong: boolean;
  /** What lies there before both begin, and what the registry does. */
  prepare?: (scene: Scene) => Promise<void> | Rule | void;
}

function leaveStaleLock({ dest }: Scene): void {
  const lock = lockOf(dest);
  mkdirSync(dirname(lock), { recursive: true });
  writeFileSync(lock, JSON.stringify({ pid: 1, host: "elsewhere", id: "0123456789abcdef" }));
  utimesSync(lock, new Date(0), new Date(0));
}

/** What a run leaves of which nobody knows whether it still writes. */
async function leaveUnfinished(scene: Scene): Promise<void> {
  const { registry, dest, references } = scene;
  const { remove } = registry.on({ kind: "layer" }, { dropAfter: 3_000 });
  await failure(pull(references.first ?? "", dest, { retries: 0, concurrency: 1 }));
  remove();
  const journal = dest.endsWith("/")
    ? join(dest, ".imgpull.partial.journal")
    : `${dest}.partial.journal`;
  writeFileSync(journal, readFileSync(journal, "utf8").replace("closed\n", ""));
}

const STORIES: Record<string, Story> = {
  "the first stops for a moment": { second: A, isLong: false },
  "the first sleeps, the second wants the same": { second: A, isLong: true },
  "the first sleeps, the tag moves meanwhile": { second: B, isLong: true },
  "the first gets wrong bytes, and sleeps": {
    second: A,
    isLong: true,
    prepare: ({ registry }) => registry.on({ kind: "layer", times: 1 }, { corruptAt: 100 }),
  },
  "a stale lock and two starts at once": { second: B, isLong: false, prepare: leaveStaleLock },
  "a stale lock, two starts, and the first sleeps": {
    second: A,
    isLong: true,
    prepare: leaveStaleLock,
  },
  "an unfinished run, of which nobody knows": { second: A, isLong: true, prepare: leaveUnfinished },
};

async function setTheScene(t: TestContext, second: TestImage, dest: string): Promise<Scene> {
  const registry = await startRegistry({}, t);
  const folder = temporaryFolder(t);
  const references = {
    first: registry.add(A, "team/a", "1.0"),
    second: registry.add(second, "team/b", "1.0"),
  };
  return { registry, folder, dest: join(folder, dest), images: { first: A, second }, references };
}

// ====== All stops, or some of them ======

/**
 * Some pairs of stops, by a seed that is printed. IMGPULL_PAIRS=all tries every one, which takes an
 * hour.
 */
const { IMGPULL_PAIRS: wantedPairs = "25" } = process.env;
const seed = Number(process.env.IMGPULL_SEED ?? Math.floor(Math.random() * 2 ** 32));

/** Mulberry32. */
function randomOf(start: number): () => number {
  let state = start;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

async function pairsOf(scene: Scene, clear: () => unknown): Promise<[number, number][]> {
  const counts: number[] = [];
  for (const name of ["first", "second"]) {
    await clear();
    const { actor, ending } = start(scene, name, Number.POSITIVE_INFINITY);
    await ending;
    counts.push(actor.steps.length);
  }
  const [ofFirst = 0, ofSecond = 0] = counts;
  assert.ok(ofFirst > 10 && ofSecond > 10, "the steps are not seen");
  const pairs = Array.from(
    { length: (ofFirst + 1) * (ofSecond + 1) },
    (_, at): [number, number] => [Math.floor(at / (ofSecond + 1)), at % (ofSecond + 1)],
  );
  if (wantedPairs === "all") return pairs;
  const random = randomOf(seed);
  return Array.from(
    { length: Number(wantedPairs) },
    () => pairs[Math.floor(random() * pairs.length)] ?? [0, 0],
  );
}

interface Exploring {
  t: TestContext;
  scene: Scene;
  story: Story;
  check: (endings: readonly Ending[], story: string) => Promise<unknown> | unknown;
}

async function explore({ t, scene, story, check }: Exploring): Promise<void> {
  watchFileSystem(t);
  let rule: Rule | undefined;
  const clear = async () => {
    for (const name of readdirSync(scene.folder))
      rmSync(join(scene.folder, name), { recursive: true });
    rule?.remove();
    rule = (await story.prepare?.(scene)) ?? undefined;
  };
  const pairs = await pairsOf(scene, clear);
  t.diagnostic(`${pairs.length} pairs of stops, IMGPULL_SEED=${seed}`);
  for (const [first, second] of pairs) {
    await clear();
    const endings = await play(scene, { first, second, isLong: story.isLong });
    const lines = endings.map(({ actor, error }, at) => {
      const stop = [first, second][at] ?? 0;
      return `${actor.name} stops before ${stop} (${actor.steps[stop]}): ${error?.message ?? "ended well"}`;
    });
    const told = lines.join("\n");
    for (const { error } of endings) if (error) assert.equal(error.code, "DISK", told);
    assert.ok(
      endings.some(({ error }) => !error),
      `both lost\n${told}`,
    );
    await check(endings, told);
  }
}

for (const [name, story] of Object.entries(STORIES)) {
  test(`a tar: ${name}`, async (t) => {
    const scene = await setTheScene(t, story.second, "app.tar");
    const tars = {
      first: await undisturbedTar(t, A),
      second: await undisturbedTar(t, story.second),
    } as Record<string, Buffer>;
    checkRename = (actor, from, to) => {
      const isRight = to !== scene.dest || tars[actor.name]?.equals(readFileSync(from));
      assert.ok(isRight, `${actor.name} gives DEST's name to ${from}, which is not what it pulled`);
    };

    const check = (endings: readonly Ending[], told: string) => {
      const there = readFileSync(scene.dest);
      const won = endings.filter(({ error }) => !error).map(({ actor }) => actor.name);
      assert.ok(
        won.some((winner) => tars[winner]?.equals(there)),
        `DEST is wrong\n${told}`,
      );
    };
    await explore({ t, scene, story, check });
  });

  test(`a layout: ${name}`, async (t) => {
    const scene = await setTheScene(t, story.second, "layout/");
    checkRename = () => undefined;
    const check = (endings: readonly Ending[], told: string) => {
      const text = readFileSync(join(scene.dest, "index.json"), "utf8");
      const { manifests } = JSON.parse(text) as {
        manifests: { digest: string; annotations: Record<string, string> }[];
      };
      for (const { actor, error } of endings) {
        if (error) continue;
        const { digest, config, layers } = scene.images[actor.name] as TestImage;
        const isListed = manifests.some(
          (entry) =>
            entry.digest === digest &&
            entry.annotations["org.opencontainers.image.ref.name"] === nameOf(actor.name),
        );
        assert.ok(isListed, `${actor.name} is not in the index\n${told}`);
        for (const blob of [digest, config.digest, ...layers.map((layer) => layer.digest)])
          assert.equal(digestOf(readFileSync(join(scene.dest, blobName(blob)))), blob, told);
      }
    };
    await explore({ t, scene, story, check });
  });
}

// ====== Processes of their own, killed at any moment ======

const ROUNDS = 12;

for (const dest of ["app.tar", "layout/"]) {
  test(`runs side by side, killed at any moment, leave nothing wrong and nobody blocked: ${dest}`, async (t) => {
    const scene = await setTheScene(t, B, dest);
    const tars = [await undisturbedTar(t, A), await undisturbedTar(t, B)];
    const random = randomOf(seed);
    t.diagnostic(`IMGPULL_SEED=${seed}`);
    const references = Object.values(scene.references);
    const runOnce = async (): Promise<void> => {
      await delay(random() * 40);
      const reference = references[Math.floor(random() * references.length)] ?? "";
      const { child, result } = startCommand([...OPTIONS, reference, scene.dest]);
      const timer = setTimeout(() => child.kill("SIGKILL"), random() * 300);
      const { exitCode, stderr } = await result;
      clearTimeout(timer);
      if (exitCode === 1) assert.match(stderr, /another imgpull|was replaced or cut/);
    };

    for (let round = 0; round < ROUNDS; round += 1) {
      await Promise.all([runOnce(), runOnce(), runOnce()]);
      if (dest.endsWith("/") || !existsSync(scene.dest)) continue;
      const there = readFileSync(scene.dest);
      assert.ok(
        tars.some((tar) => tar.equals(there)),
        "DEST is wrong",
      );
    }

    for (const reference of references) {
      const { exitCode, stderr } = await runCommand([...OPTIONS, reference, scene.dest]);
      assert.equal(exitCode, 0, stderr);
    }
    const names = readdirSync(scene.folder, { recursive: true }) as string[];
    assert.deepEqual(
      names.filter((name) => name.includes("partial")),
      [],
    );
  });
}

// Many blobs, many images: the work grows with their number, and not with its square. It is counted
// as members of lists that are looked at, in the whole process, not in seconds.
import assert from "node:assert/strict";
import { createWriteStream } from "node:fs";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { internals, listTar, pullImages, verifyTar } from "../imgpull.ts";
import { temporaryFolder } from "./support/command.ts";
import { makeImage, makeMultiPlatform, type TestContent } from "./support/image.ts";
import { startRegistry } from "./support/registry.ts";

const { BlobState, Schedule } = internals;
type Blob = InstanceType<typeof BlobState>;
type Schedule = InstanceType<typeof Schedule>;
type Segment = NonNullable<ReturnType<Schedule["next"]>>;
type RegistryOf = ConstructorParameters<typeof BlobState>[1];

/** So few connections that no more of them are tried: each has its own part in a round's work. */
const OPTIONS = { scheme: "http", osType: "linux", archType: "amd64", concurrency: 4 } as const;

// ====== Counting ======

type Method = (this: unknown[], ...args: unknown[]) => unknown;
const LISTS = Array.prototype as unknown as Record<string | symbol, Method>;

const VISITORS = ["every", "filter", "find", "flatMap", "map", "reduce", "some"];

/**
 * What is as short as the list of connections is looked at in each round, and how many rounds there
 * are is the machine's affair.
 */
const SHORT = 50;

/** How many members of longer lists are looked at while something runs. */
async function countLooks(run: () => unknown): Promise<number> {
  let looks = 0;
  const visiting = (original: Method): Method =>
    function (visit, ...rest) {
      if (this.length <= SHORT) return original.call(this, visit, ...rest);
      const counted: Method = (...args) => {
        looks += 1;
        return (visit as Method).apply([], args);
      };
      return original.call(this, counted, ...rest);
    };
  const iterating = (original: Method): Method =>
    function () {
      if (this.length > SHORT) looks += this.length; // it is spread, or walked over
      return original.call(this);
    };

  const originals = [...VISITORS, Symbol.iterator].map(
    (name) => [name, LISTS[name] as Method] as const,
  );
  for (const [name, original] of originals)
    LISTS[name] = name === Symbol.iterator ? iterating(original) : visiting(original);
  try {
    await run();
    return looks;
  } finally {
    for (let at = 0; at < originals.length; at += 1) {
      const entry = originals[at];
      if (entry) LISTS[entry[0]] = entry[1];
    }
  }
}

/** Twice as many of something have to cost twice as much; four times would be the square. */
async function assertLinear(t: TestContext, few: number, work: (count: number) => unknown) {
  const once = await countLooks(() => work(few));
  const twice = await countLooks(() => work(2 * few));
  t.diagnostic(`${once} looks, then ${twice}: ${(twice / once).toFixed(2)} times`);
  assert.ok(once > few, "nothing was counted");
  assert.ok(twice <= 2.5 * once, `${(twice / once).toFixed(2)} times`);
}

// ====== Blobs ======

const registry = { acceptsRanges: true, origin: "http://registry" } as unknown as RegistryOf;

function scheduleOf(count: number): Schedule {
  const schedule = new Schedule({ most: 8 });
  const blobs = Array.from({ length: count }, (_, at): Blob => {
    const digest = `sha256:${String(at).padStart(64, "0")}`;
    return new BlobState({ mediaType: "", digest, size: 1000 + at }, registry);
  });
  schedule.add(blobs);
  return schedule;
}

/** Asks for what is next, if there is anything. */
function ask(schedule: Schedule): Segment | undefined {
  const segment = schedule.next();
  if (segment) schedule.asked(segment, 0);
  return segment;
}

function receive(schedule: Schedule, segment: Segment): void {
  schedule.answered(segment, { waitMs: 1, isRange: false, isMiss: false, isElsewhere: false });
  schedule.advance(segment, segment.remainingBytes, segment.to);
  schedule.paused(segment);
  assert.ok(schedule.isLast(segment));
  schedule.end(segment);
}

test("a schedule of twice as many blobs is twice the work", (t) =>
  assertLinear(t, 3000, (count) => {
    const schedule = scheduleOf(count);
    for (let segment = ask(schedule); segment; segment = ask(schedule)) {
      schedule.observe(0, 0);
      receive(schedule, segment);
    }
    assert.ok(schedule.isOver);
  }));

test("so it is where the registry takes one connection", (t) =>
  assertLinear(t, 3000, (count) => {
    const schedule = scheduleOf(count);
    let segment = ask(schedule);
    const refused = ask(schedule);
    assert.ok(refused && schedule.crowded(refused, 0));
    schedule.yieldSegment(refused);
    schedule.end(refused);

    for (; segment; segment = ask(schedule)) {
      assert.equal(schedule.next(), undefined);
      receive(schedule, segment);
    }
    assert.ok(schedule.isOver);
  }));

test("a schedule takes more blobs than a function takes arguments", () => {
  const digest = `sha256:${"0".repeat(64)}`;
  const blob = new BlobState({ mediaType: "", digest, size: 1 }, registry);
  const schedule = new Schedule({ most: 8 });
  schedule.add(Array<Blob>(300_000).fill(blob));
  assert.ok(!schedule.isOver);
});

for (const dest of ["image.tar", "folder/", "a stream"]) {
  test(`a pull of twice as many layers is twice the work: ${dest}`, async (t) => {
    const folder = temporaryFolder(t);
    const registry = await startRegistry({}, t);
    const pull = async (count: number) => {
      const layers = Array.from({ length: count }, (_, layer) => 4000 + (layer % 50));
      const reference = registry.add(makeImage({ seed: "many", layers }), "team/app", `${count}`);
      const to = join(folder, `${count}${dest}`);
      return () =>
        pullImages([reference], dest.startsWith("a ") ? createWriteStream(to) : to, OPTIONS);
    };
    const pulls = new Map([
      [300, await pull(300)],
      [600, await pull(600)],
    ]);
    await assertLinear(t, 300, (count) => pulls.get(count)?.());
  });
}

test("looking at a tar of twice as many layers is twice the work", async (t) => {
  const folder = temporaryFolder(t);
  const registry = await startRegistry({}, t);
  const tarOf = (count: number) => join(folder, `${count}.tar`);
  for (const count of [300, 600]) {
    const layers = Array.from({ length: count }, (_, layer) => 4000 + (layer % 50));
    const reference = registry.add(makeImage({ seed: "many", layers }), "team/app", `${count}`);
    await pullImages([reference], tarOf(count), OPTIONS);
  }
  await assertLinear(t, 300, (count) => verifyTar(tarOf(count)));
  await assertLinear(t, 300, (count) => listTar(tarOf(count)));
});

// ====== Images ======

test("a pull of twice as many images is twice the work", async (t) => {
  const folder = temporaryFolder(t);
  const registry = await startRegistry({}, t);
  const references = Array.from({ length: 200 }, (_, at) => {
    const image: TestContent = makeMultiPlatform(["linux/amd64"], { seed: `image ${at}` });
    return registry.add(image, "team/app", `${at}`);
  });
  await assertLinear(t, 100, (count) =>
    pullImages(references.slice(0, count), join(folder, `${count}.tar`), OPTIONS),
  );
});

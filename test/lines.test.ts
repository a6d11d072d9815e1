// How connections are chosen, over lines that are only reckoned: no socket, no clock. What a line
// allows is compared with what Pace and Schedule make of it, and what they ask for is counted.
import assert from "node:assert/strict";
import { test } from "node:test";
import { internals } from "../imgpull.ts";

const { BlobState, Schedule, TUNING, isCacheMiss } = internals;
type Segment = NonNullable<ReturnType<InstanceType<typeof Schedule>["next"]>>;
type Blob = InstanceType<typeof BlobState>;
type Registry = ConstructorParameters<typeof BlobState>[1];

const MB = 1e6;

interface Line {
  roundTripMs: number;
  /** Bytes in a millisecond: of one connection, and of all together. */
  each?: number;
  all?: number;
  /**
   * A connection begins with ten packets for each round trip, and doubles that with each (RFC
   * 6928).
   */
  slowStart?: true;
  /** What our processor takes in at most. */
  processor?: number;
  /** More connections are refused. */
  admits?: number;
  /**
   * Between us and the registry: how long it takes to begin with a blob, and with one that it has.
   * For each range it fetches what lies before that, too.
   */
  cache?: { coldMs: number; warmMs: number; keepsSmall: boolean };
  /** The registry sends us to a storage. */
  isStorage?: true;
  /** Hardly anything comes between these two moments. */
  hiccup?: [fromMs: number, toMs: number];
  /** From then on the line is another one. */
  later?: { fromMs: number; each?: number; all?: number };
  /** How late our own timers are. */
  timersLateMs?: number;
}

interface Flow {
  segment: Segment;
  /** The first byte is here then; the answer ends there. */
  firstMs: number;
  askedMs: number;
  waitMs: number;
  answeredTo: number;
  isRange: boolean;
  flowsSinceMs: number;
  isRefused: boolean;
}

interface Outcome {
  ms: number;
  requests: number;
  refused: number;
  most: number;
  lookedTwice: boolean;
}

interface PlayOptions {
  /** The most connections. */
  most?: number;
  /** What an earlier run has got of each blob. */
  resumed?: Parameters<Blob["resume"]>[0][];
  /** Whether there is something small that can be asked for twice. */
  hasSmall?: boolean;
  hasRanges?: boolean;
}

/** Plays a pull of blobs of these sizes to its end. */
function play(line: Line, sizes: number[], options: PlayOptions = {}): Outcome {
  const { most = 16, resumed = [], hasSmall = true, hasRanges = true } = options;
  const origin = "http://registry";
  const registry = { acceptsRanges: hasRanges, origin } as unknown as Registry;
  const blobs = sizes.map((size, at): Blob => {
    const digest = `sha256:${String(at).padStart(64, "0")}`;
    const blob = new BlobState({ mediaType: "", digest, size }, registry, 0, []);
    blob.resume(resumed[at] ?? []);
    return blob;
  });
  const schedule = new Schedule({ most });
  schedule.add(blobs);

  const flows = new Set<Flow>();
  const outcome: Outcome = { ms: 0, requests: 0, refused: 0, most: 0, lookedTwice: false };
  let idle = 1; // the manifest's connection
  let lookMs: number | undefined;
  let busyMs = 0;

  const start = (segment: Segment, nowMs: number) => {
    const { blob, at, to } = segment;
    const isRange = hasRanges && (at > 0 || to < blob.descriptor.size);
    const connectMs = idle > 0 ? 0 : line.roundTripMs;
    idle = Math.max(0, idle - 1);
    const { cache } = line;
    const each = line.each ?? line.all ?? 1;
    // A cache that fetches for each range what lies before it, too.
    const fetchMs = cache ? cache.coldMs + (isRange ? at / each : 0) : 0;
    const waitMs = line.roundTripMs + fetchMs;
    const firstMs = nowMs + connectMs + waitMs;
    const isRefused = flows.size >= (line.admits ?? Infinity);
    schedule.asked(segment, nowMs);
    flows.add({
      segment,
      askedMs: nowMs,
      firstMs: isRefused ? nowMs + connectMs + line.roundTripMs : firstMs,
      waitMs,
      answeredTo: isRange ? to : blob.descriptor.size,
      isRange,
      flowsSinceMs: firstMs,
      isRefused,
    });
    outcome.requests += 1;
    outcome.most = Math.max(outcome.most, flows.size);
  };

  const finish = (flow: Flow) => {
    const { segment } = flow;
    flows.delete(flow);
    schedule.paused(segment);
    if (segment.isComplete || flow.isRefused) {
      if (segment.at === flow.answeredTo) idle += 1;
      schedule.end(segment);
    }
  };

  let nextRoundMs = 0;
  const round = (nowMs: number) => {
    // As in a pull: so long after the last one, whatever led to that.
    nextRoundMs = nowMs + TUNING.tickMs + (line.timersLateMs ?? 0);
    schedule.observe(nowMs, busyMs);
    for (const segment of schedule.takeAbandoned(nowMs))
      for (const flow of flows) if (flow.segment === segment) finish(flow);
    const look = schedule.registryToLookAt();
    if (look && !hasSmall) schedule.lookedAgain(look, "impossible");
    if (look && hasSmall) {
      schedule.lookedAgain(look, "under way");
      outcome.lookedTwice = true;
      lookMs = nowMs + line.roundTripMs + 1;
    }
    if (lookMs !== undefined && nowMs >= lookMs) {
      const { cache } = line;
      const fetchMs = cache?.keepsSmall ? cache.warmMs : (cache?.coldMs ?? 0);
      schedule.lookedAgain(registry, { waitMs: line.roundTripMs + fetchMs });
      lookMs = undefined;
    }
    for (let next = schedule.next(); next; next = schedule.next()) start(next, nowMs);
  };

  for (let nowMs = 0; !schedule.isOver; nowMs += 1) {
    assert.ok(nowMs < 600_000, "it never ends");
    if (nowMs >= nextRoundMs) round(nowMs);
    const isHiccup = line.hiccup && nowMs >= line.hiccup[0] && nowMs < line.hiccup[1];
    const { each = Infinity, all = Infinity } =
      line.later && nowMs >= line.later.fromMs ? line.later : line;

    let hasEnded = false;
    const moving = [...flows].filter(({ firstMs }) => nowMs >= firstMs);
    const room = Math.min(all, line.processor ?? Infinity) / Math.max(1, moving.length);
    let came = 0;
    for (const flow of moving) {
      const { segment } = flow;
      if (flow.isRefused) {
        outcome.refused += 1;
        assert.ok(schedule.crowded(segment, nowMs), "refused, and nobody else moves");
        schedule.yieldSegment(segment);
        finish(flow);
        hasEnded = true;
        continue;
      }
      if (!segment.isFlowing)
        schedule.answered(segment, {
          waitMs: flow.waitMs,
          isRange: flow.isRange,
          isMiss: false,
          isElsewhere: line.isStorage ?? false,
        });
      const trips = (nowMs - flow.flowsSinceMs) / line.roundTripMs;
      const window = line.slowStart
        ? (14_600 * 2 ** Math.min(30, trips)) / line.roundTripMs
        : Infinity;
      let bytes = isHiccup ? 1 : Math.max(1, Math.floor(Math.min(each, room, window)));
      while (bytes > 0 && !segment.isComplete) {
        const taken = Math.min(bytes, segment.remainingBytes);
        schedule.advance(segment, taken, flow.answeredTo);
        bytes -= taken;
        came += taken;
      }
      if (segment.isComplete) {
        finish(flow);
        hasEnded = true;
      } else if (segment.at >= flow.answeredTo) {
        finish(flow);
        start(segment, nowMs); // it was given back what its answer does not hold
      }
    }
    busyMs += Math.min(1, came / (line.processor ?? Infinity));
    if (hasEnded) round(nowMs);
    outcome.ms = nowMs;
  }
  return outcome;
}

/** The least time: from the first request on, with so many connections. */
function leastMs(
  { roundTripMs, each = Infinity, all = Infinity, processor = Infinity }: Line,
  sizes: number[],
  connections = 16,
) {
  const bytes = sizes.reduce((sum, size) => sum + size, 0);
  return roundTripMs + bytes / Math.min(connections * each, all, processor);
}

const TYPICAL = [15, 25, 36, 50, 60].map((mb) => mb * MB);
const MANY = Array<number>(30).fill(2 * MB);
const ONE = [60 * MB];
const NEAR: Line = { roundTripMs: 2, each: 8000 };
const FAR: Line = { roundTripMs: 40, each: 10_000 };
const OCEAN: Line = { roundTripMs: 150, each: 2000 };
const OFFICE: Line = { roundTripMs: 10, all: 20_000 };
const REGION: Line = { roundTripMs: 2, each: 50_000, all: 100_000 };
const SATELLITE: Line = { roundTripMs: 600, each: 1000, all: 10_000 };

/** A line, an image, and how near to the least time a pull of it has to end. */
const LINES: [name: string, line: Line, sizes: number[], ratio: number][] = [
  ["near and throttled, one layer", NEAR, ONE, 1.6],
  ["near and throttled, five layers", NEAR, TYPICAL, 1.3],
  ["far, one layer", FAR, ONE, 1.75],
  ["far, five layers", FAR, TYPICAL, 1.4],
  ["far, many layers", FAR, MANY, 1.9],
  ["across an ocean, one layer", OCEAN, ONE, 1.4],
  ["across an ocean, five layers", OCEAN, TYPICAL, 1.2],
  ["an office, one layer", OFFICE, ONE, 1.02],
  ["an office, five layers", OFFICE, TYPICAL, 1.02],
  ["an office, many layers", OFFICE, MANY, 1.1],
  ["a far office, one layer", { ...OFFICE, roundTripMs: 60 }, ONE, 1.1],
  ["a region, five layers", REGION, TYPICAL, 1.12],
  ["a region, one large layer", REGION, [1000 * MB], 1.2],
  ["a satellite, one layer", SATELLITE, ONE, 1.35],
  ["far, slow start, one layer", { ...FAR, slowStart: true }, ONE, 2.6],
];

for (const [name, line, sizes, ratio] of LINES) {
  test(`near to what the line allows: ${name}`, (t) => {
    const { ms, requests, most } = play(line, sizes);
    const least = leastMs(line, sizes);
    t.diagnostic(`${(ms / least).toFixed(2)} times, ${requests} requests, ${most} connections`);
    assert.ok(ms <= ratio * least, `${ms} ms, ${(ms / least).toFixed(2)} times ${least}`);
    assert.ok(most <= 16);
  });
}

test("one connection is used where the user says so, with one request for each blob", () => {
  const { requests, most } = play(FAR, TYPICAL, { most: 1 });
  assert.deepEqual([requests, most], [5, 1]);
});

test("a line that has nothing under way for a moment is not judged by that moment", () => {
  // One blob after the other, each gone when the line is looked at; and the gaps of one blob.
  const line = { roundTripMs: 2, each: 5000, timersLateMs: 1 };
  const sizes = Array.from({ length: 60 }, (_, at) => MB + at * line.each);
  assert.equal(play(line, sizes, { most: 1 }).requests, sizes.length);

  const gaps = sizes.map((size, at) => [at * 2 * MB + size, (at + 1) * 2 * MB] as const);
  const { requests } = play(line, [sizes.length * 2 * MB], { most: 1, resumed: [gaps] });
  assert.equal(requests, gaps.length);
});

for (const most of [2, 5, 16, 64]) {
  test(`never more than ${most} connections where the user says so`, () => {
    for (const [, line, sizes] of LINES) assert.ok(play(line, sizes, { most }).most <= most);
  });
}

test("a line that one connection fills gets hardly any ranges", () => {
  // Four trials of eight connections in 50 s, of which nothing comes: what they have cut is fetched
  // to its end.
  const { ms, requests } = play({ roundTripMs: 1, all: 20_000 }, [1000 * MB]);
  assert.ok(ms <= (1.01 * (1000 * MB)) / 20_000, `${ms} ms`);
  assert.ok(requests <= 1 + 4 * 8, `${requests} requests`);
});

test("a processor that is full gets no ranges at all", () => {
  const { requests, most } = play({ roundTripMs: 1, all: 1_000_000, processor: 200_000 }, [
    1000 * MB,
  ]);
  assert.deepEqual([requests, most], [1, 1]);
});

test("a processor that could hardly do more gets no ranges of a fast line", () => {
  const line = { roundTripMs: 1, all: 200_000, processor: 250_000 };
  const { requests, most } = play(line, [4000 * MB]);
  assert.deepEqual([requests, most], [1, 1]);
});

test("a line that one connection fills, and fast, gets one more for a moment", () => {
  const { ms, requests } = play({ roundTripMs: 1, all: 400_000 }, [4000 * MB]);
  assert.ok(ms <= 1.01 * ((4000 * MB) / 400_000), `${ms} ms`);
  assert.ok(requests > 1 && requests <= 1 + 2 * 4, `${requests} requests`);
});

test("a line so fast that little is left is left alone", () => {
  const { requests, most } = play({ roundTripMs: 1, all: 400_000 }, [1000 * MB]);
  assert.deepEqual([requests, most], [1, 1]);
});

test("a hiccup of the line is no reason to try more connections", () => {
  const once = play({ roundTripMs: 1, all: 400_000, hiccup: [700, 790] }, [1000 * MB]);
  const slow = { roundTripMs: 1, all: 400_000, later: { fromMs: 700, all: 20_000 } };
  assert.deepEqual([once.requests, once.most], [1, 1]);
  assert.ok(play(slow, [1000 * MB]).requests > 1, "a line that stays slow is one");
});

test("a line that becomes slower in mid-pull gets more connections then", () => {
  // One connection fills it at first; then each is held down to a tenth.
  const line: Line = { ...OFFICE, later: { fromMs: 2000, each: 2000, all: 20_000 } };
  const { ms, most } = play(line, [200 * MB]);
  assert.equal(most, 16);
  assert.ok(ms <= (1.25 * (200 * MB)) / 20_000, `${ms} ms`);
});

test("a line that becomes faster in mid-pull is full again", () => {
  const line: Line = { ...FAR, each: 1000, later: { fromMs: 3000, each: 10_000 } };
  const { ms } = play(line, [500 * MB]);
  assert.ok(ms <= 3000 + (1.2 * (460 * MB)) / 160_000, `${ms} ms`);
});

for (const admits of [1, 2, 3, 5]) {
  for (const [name, sizes] of [
    ["one large blob", ONE],
    ["many small ones", MANY],
    ["one large and many small ones", [...ONE, ...MANY]],
  ] as const) {
    test(`a server that admits ${admits}, ${name}: it gets so many, and refuses few`, () => {
      const line = { ...FAR, admits };
      const { ms, refused } = play(line, [...sizes]);
      const least = leastMs(line, [...sizes], admits);
      assert.ok(refused <= 16, `${refused} refused`);
      assert.ok(ms <= 1.6 * least, `${(ms / least).toFixed(2)} times`);
    });
  }
}

test("what a stream needs first is asked for first again, whatever else was refused", () => {
  const registry = { acceptsRanges: true, origin: "http://registry" } as unknown as Registry;
  const blobs = [0, 1, 2, 3].map((at) => {
    const digest = `sha256:${String(at).padStart(64, "0")}`;
    return new BlobState({ mediaType: "", digest, size: MB }, registry, at * MB, []);
  });
  const schedule = new Schedule({ most: 16, horizon: () => Infinity });
  schedule.add(blobs);
  const segments = blobs.map(() => schedule.next() as Segment);
  for (const segment of segments) schedule.asked(segment, 0);

  // All but the first are refused, and give up one after the other.
  for (const segment of segments.slice(1)) {
    assert.ok(schedule.crowded(segment, 0));
    schedule.yieldSegment(segment);
    schedule.paused(segment);
    schedule.end(segment);
  }
  schedule.end(segments[0] as Segment);
  assert.equal(schedule.next()?.blob, blobs[1]);
});

test("who waits for a stream's reader makes room for what the reader waits for", () => {
  const registry = { acceptsRanges: true, origin: "http://registry" } as unknown as Registry;
  const [near, far] = [10 * MB, 64 * MB].map((size, at): Blob => {
    const digest = `sha256:${String(at).padStart(64, "0")}`;
    return new BlobState({ mediaType: "", digest, size }, registry, at * 10 * MB, []);
  }) as [Blob, Blob];
  const schedule = new Schedule({ most: 2, horizon: () => 32 * MB });
  schedule.add([near, far]);
  const [first, second] = [schedule.next(), schedule.next()] as [Segment, Segment];
  for (const segment of [first, second]) schedule.asked(segment, 0);
  schedule.answered(second, { waitMs: 1, isRange: false, isMiss: false, isElsewhere: false });
  schedule.advance(second, 25 * MB, 64 * MB); // beyond the horizon: it waits for the first one now

  assert.ok(schedule.crowded(first, 0));
  assert.deepEqual(schedule.takeAbandoned(0), [second]);
  schedule.yieldSegment(first);
  schedule.end(first);
  assert.equal(schedule.next()?.blob, near, "while the other's bytes still wait for the reader");
  schedule.end(second);
  assert.deepEqual(schedule.isOver, false, "the rest of it is to come");
});

test("a range that is given back takes nothing along that has come already", () => {
  const registry = { acceptsRanges: true, origin: "http://registry" } as unknown as Registry;
  const digest = `sha256:${"0".repeat(64)}`;
  const blob = new BlobState({ mediaType: "", digest, size: 64 * MB }, registry, 0, []);
  blob.resume([[8 * MB, 14 * MB]]);
  const schedule = new Schedule({ most: 16 });
  schedule.add([blob]);
  const first = schedule.next() as Segment;
  schedule.asked(first, 0);
  schedule.answered(first, { waitMs: 1, isRange: true, isMiss: false, isElsewhere: false });
  const second = schedule.next() as Segment;
  assert.deepEqual([first.to, second.at, second.to], [8 * MB, 14 * MB, 64 * MB]);

  schedule.yieldSegment(second);
  schedule.end(second);
  assert.equal(first.to, 8 * MB);
  const again = schedule.next() as Segment;
  assert.deepEqual([again.at, again.to], [14 * MB, 64 * MB]);
});

// ====== Caches between us and the registry ======

const CACHE_WORDS: [says: string, headers: Record<string, string>, isMiss: boolean][] = [
  ["nothing", { age: "0", via: "1.1 proxy" }, false],
  ["squid", { "x-cache": "MISS from proxy" }, true],
  ["squid, which has it", { "x-cache": "HIT from proxy" }, false],
  ["nginx", { "x-cache-status": "MISS" }, true],
  ["nginx, which renews it", { "x-cache-status": "EXPIRED" }, false],
  ["Cloudflare", { "cf-cache-status": "MISS" }, true],
  ["Cloudflare, which keeps none of it", { "cf-cache-status": "DYNAMIC" }, false],
  ["CloudFront", { "x-cache": "Miss from cloudfront" }, true],
  ["CloudFront, which has asked", { "x-cache": "RefreshHit from cloudfront" }, false],
  ["Akamai", { "x-cache": "TCP_MISS from a23-1.deploy.example.com (AkamaiGHost)" }, true],
  ["Fastly, whose edge and shield have none", { "x-cache": "MISS, MISS" }, true],
  ["Fastly, whose edge had it of its shield", { "x-cache": "MISS, HIT" }, false],
  ["RFC 9211", { "cache-status": "proxy; fwd=uri-miss; stored" }, true],
  ["RFC 9211, which has it", { "cache-status": "far; fwd=miss, near; hit" }, false],
  ["Varnish", { "x-varnish": "32770" }, true],
  ["Varnish, which has it", { "x-varnish": "32773 32771" }, false],
];

for (const [says, headers, isMiss] of CACHE_WORDS) {
  test(`whether a cache says that it had to fetch: ${says}`, () => {
    assert.equal(isCacheMiss({ headers }), isMiss);
  });
}

test("a cache that has to fetch a blob first is heard to its end, and asked once for each blob", () => {
  // It fetches the whole for each range: nginx's proxy_cache without a lock.
  const cache = { coldMs: 60, warmMs: 0, keepsSmall: true };
  for (const sizes of [
    [1000, 60 * MB],
    [1000, ...TYPICAL],
  ]) {
    const { requests, lookedTwice } = play({ roundTripMs: 1, each: 6000, cache }, sizes);
    assert.deepEqual([requests, lookedTwice], [sizes.length, true]);
  }
});

test("a cache that answers a range late is found out by the first ones, which are given back", () => {
  // It keeps nothing small, so that a second look tells nothing: a range waits until what lies
  // before it has come.
  const cache = { coldMs: 60, warmMs: 0, keepsSmall: false };
  const line = { roundTripMs: 1, each: 6000, cache };
  const { ms, requests } = play(line, [1000, 60 * MB]);
  assert.ok(requests <= 2 + 8, `${requests} requests`);
  assert.ok(ms <= 1.05 * leastMs(line, [60 * MB], 1), `${ms} ms`);
});

test("a cache that is busy at the second look is found out by two late ranges", () => {
  const cache = { coldMs: 30, warmMs: 6, keepsSmall: true };
  const { requests, most } = play({ roundTripMs: 1, each: 6000, cache }, [30 * MB]);
  assert.deepEqual([requests, most], [1 + 2, 2]);
});

test("where nothing small is there to look at, two late ranges are enough", () => {
  const cache = { coldMs: 30, warmMs: 0, keepsSmall: true };
  const line = { roundTripMs: 1, each: 6000, cache };
  const { ms, requests, most } = play(line, [30 * MB], { hasSmall: false });
  assert.deepEqual([requests, most], [1 + 2, 2]);
  assert.ok(ms <= 1.05 * leastMs(line, [30 * MB], 1), `${ms} ms`);
});

test("where nothing small is there to look at, one prompt range is enough", () => {
  const { ms, requests, most } = play(FAR, [200 * MB], { hasSmall: false });
  assert.ok(requests > 16 && most === 16, `${requests} requests`);
  assert.ok(ms <= 1.4 * leastMs(FAR, [200 * MB]), `${ms} ms`);
});

test("a far registry that sends us to its storage is not looked at: ranges come sooner", () => {
  const { ms, lookedTwice } = play({ ...FAR, isStorage: true }, [1000, 60 * MB]);
  assert.equal(lookedTwice, false);
  const before = play(FAR, [1000, 60 * MB]).ms;
  assert.ok(before - ms >= FAR.roundTripMs / 2, `${ms} ms, ${before} ms`);
});

test("a far registry without a cache is looked at twice, and given ranges", () => {
  const { requests, lookedTwice } = play(FAR, [1000, 60 * MB]);
  assert.equal(lookedTwice, true);
  assert.ok(requests > 8);
});

/** What an earlier run has got of a blob of 64 MB: it has nine gaps. */
const HAD = Array.from({ length: 8 }, (_, at) => [(at * 8 + 1) * MB, (at * 8 + 7) * MB] as const);

for (const hasSmall of [true, false]) {
  const words = hasSmall ? "" : ", where nothing small is there to look at";
  test(`of a blob with gaps, a cache that has to fetch it is asked one after the other${words}`, () => {
    const cache = { coldMs: 30, warmMs: 0, keepsSmall: true };
    const line = { roundTripMs: 1, each: 6000, cache };
    const { requests, most } = play(line, [64 * MB], { resumed: [HAD], hasSmall });
    assert.deepEqual([requests, most <= (hasSmall ? 1 : 2)], [9, true], `${requests}, ${most}`);
  });
}

test("of a blob with gaps, a registry without a cache is asked for all at once", () => {
  const { ms, most } = play(FAR, [64 * MB], { resumed: [HAD] });
  assert.ok(most >= TUNING.firstConnections, `${most} connections`);
  assert.ok(ms <= 600, `${ms} ms`);
});

test("of a blob with gaps, a registry that refuses ranges is asked once for the whole", () => {
  const { requests } = play(FAR, [64 * MB, 64 * MB], { resumed: [HAD, HAD], hasRanges: false });
  assert.equal(requests, 2);
});

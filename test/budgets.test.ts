// What registries may make one pull read and hold: each member ends within seconds, in bounded
// memory, as an error that names the bound. The registries here answer as fast as they can.
import assert from "node:assert/strict";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { internals } from "../imgpull.ts";
import { runCommand, type TestScope, temporaryFolder } from "./support/command.ts";
import { digestOf, MEDIA, makeManifest, type TestContent } from "./support/image.ts";
import { type RegistryOptions, startRegistry } from "./support/registry.ts";

const { LIMITS } = internals;
const PEAK_BYTES = 300 * 1024 * 1024;

/** Pulls by the command, and says how much memory it took at most. */
async function pullCounting(t: TestScope, content: TestContent, args: string[]) {
  const registry = await startRegistry({} satisfies RegistryOptions, t);
  const reference = registry.add(content, "team/app", "1.0");
  const folder = temporaryFolder(t);
  const meter = join(folder, "meter.cjs");
  const usage = join(folder, "usage");
  // Linux tells it of the program itself; elsewhere only the bounds of requests are looked at.
  const script = `process.once("exit", () => {
    const { existsSync, readFileSync, writeFileSync } = require("node:fs");
    const file = "/proc/self/status";
    const status = existsSync(file) ? readFileSync(file, "latin1") : "";
    writeFileSync(${JSON.stringify(usage)}, /VmHWM:\\s+(\\d+) kB/.exec(status)?.[1] ?? "0");
  });`;
  writeFileSync(meter, script);
  const { exitCode, stderr } = await runCommand(
    [reference, join(folder, "image.tar"), "--scheme", "http", "--retries", "0", ...args],
    { nodeArgs: ["--require", meter], guardMs: 30_000 },
  );
  const peakBytes = Number(readFileSync(usage, "utf8")) * 1024;
  assert.deepEqual(readdirSync(folder).sort(), ["meter.cjs", "usage"]);
  return { exitCode, stderr, peakBytes, requests: registry.requests.length };
}

const indexOf = (children: readonly TestContent[]): TestContent => {
  const manifests = children.map(({ mediaType, digest, bytes }, at) => ({
    mediaType,
    digest,
    size: bytes.length,
    ...(mediaType === MEDIA.ociManifest && {
      platform: { os: "linux", architecture: "amd64", variant: `v${at}` },
    }),
  }));
  const index = makeManifest(MEDIA.ociIndex, {
    schemaVersion: 2,
    mediaType: MEDIA.ociIndex,
    manifests,
  });
  for (const child of children)
    for (const [digest, manifest] of child.manifests) index.manifests.set(digest, manifest);
  return index;
};

const config = { mediaType: MEDIA.ociConfig, digest: digestOf("config"), size: 6 };

/** A manifest that is as large as one may be. */
function largeManifest(seed: number): TestContent {
  const text = JSON.stringify({
    schemaVersion: 2,
    mediaType: MEDIA.ociManifest,
    config,
    layers: [],
    annotations: { seed: `${seed}` },
  });
  return makeManifest(MEDIA.ociManifest, Buffer.from(text.padEnd(LIMITS.manifestBytes)));
}

/** One that names as many layers as fit into it. */
function layeredManifest(seed: number): TestContent {
  const hex = `${seed}`.padStart(4, "0");
  const layers = Array.from({ length: 36_000 }, (_, at) => ({
    mediaType: "",
    digest: `sha256:${hex}${`${at}`.padStart(60, "0")}`,
    size: 1,
  }));
  const manifest = { schemaVersion: 2, mediaType: MEDIA.ociManifest, config, layers };
  return makeManifest(MEDIA.ociManifest, Buffer.from(JSON.stringify(manifest)));
}

/** An index of indexes of indexes, each of which has entries of its own. */
function nestedIndexes(width: number, depth: number, path = ""): TestContent {
  if (depth === 0) {
    const annotations = { path };
    return makeManifest(MEDIA.ociManifest, { schemaVersion: 2, config, layers: [], annotations });
  }
  const children = Array.from({ length: width }, (_, at) =>
    nestedIndexes(width, depth - 1, `${path}/${at}`),
  );
  return indexOf(children);
}

const many = <T>(count: number, make: (at: number) => T) =>
  Array.from({ length: count }, (_, at) => make(at));

/** A layer without bytes under a digest of its own, which cannot be right. */
const emptyLayer = (at: number) => ({
  mediaType: MEDIA.ociGzip,
  digest: `sha256:${`${at}`.padStart(64, "0")}`,
  size: 0,
});

type Member = [name: string, content: () => TestContent, words: RegExp, most: number];

const MEMBERS: Member[] = [
  [
    "300 manifests of 4 MB",
    () => indexOf(many(300, largeManifest)),
    /manifests and configs are above 83.9 MB in all/,
    40,
  ],
  [
    "60 manifests of 36,000 layers",
    () => indexOf(many(60, layeredManifest)),
    /(more than 100000 layers|manifests and configs are above 83.9 MB)/,
    61,
  ],
  [
    "indexes nested 40 × 40 × 40",
    () => nestedIndexes(40, 3),
    /its indexes name more than 2048 manifests/,
    2200,
  ],
  [
    "20,000 layers of no bytes",
    () =>
      makeManifest(MEDIA.ociManifest, {
        schemaVersion: 2,
        config,
        layers: many(20_000, emptyLayer),
      }),
    /is said to have no bytes, and is not their digest/,
    1,
  ],
  ["an index of 1,025 entries", () => indexOf(many(1025, largeOnce)), /more than 1024 entries/, 1],
];

let once: TestContent | undefined;
function largeOnce(): TestContent {
  once ??= makeManifest(MEDIA.ociManifest, { schemaVersion: 2, config, layers: [] });
  return once;
}

describe("a registry that sends without end", () => {
  for (const [name, content, words, most] of MEMBERS) {
    test(`${name}, all of them wanted`, { timeout: 60_000 }, async (t) => {
      const outcome = await pullCounting(t, content(), ["--platform", "all"]);
      assert.equal(outcome.exitCode, 1);
      assert.match(outcome.stderr, words);
      assert(outcome.requests <= most, `${outcome.requests} requests`);
      assert(outcome.peakBytes < PEAK_BYTES, `${outcome.peakBytes} bytes of memory`);
      assert(outcome.stderr.trim().split("\n").length <= 3, outcome.stderr);
    });
  }

  test("indexes nested 40 × 40 × 40, one platform wanted", { timeout: 60_000 }, async (t) => {
    const args = ["--platform", "linux/s390x"];
    const outcome = await pullCounting(t, nestedIndexes(40, 3), args);
    assert.equal(outcome.exitCode, 1);
    assert(outcome.requests <= 2200, `${outcome.requests} requests`);
    assert(outcome.peakBytes < PEAK_BYTES, `${outcome.peakBytes} bytes of memory`);
  });

  test("JSON nested a million deep", { timeout: 60_000 }, async (t) => {
    const deep = (open: string, close: string) => open.repeat(400_000) + close.repeat(400_000);
    const texts = [
      deep("[", "]"),
      deep('{"a":', "").slice(0, -1),
      `{"schemaVersion":2,"config":${JSON.stringify(config)},"layers":${deep("[", "]")}}`,
      `{"schemaVersion":2,"manifests":[{"digest":${deep("[", "]")}}]}`,
    ];
    for (const text of texts) {
      const content = makeManifest(MEDIA.ociManifest, Buffer.from(text));
      const outcome = await pullCounting(t, content, ["--platform", "all"]);
      assert.equal(outcome.exitCode, 1, outcome.stderr);
      assert.doesNotMatch(outcome.stderr, /^ +at /m);
      assert(outcome.peakBytes < PEAK_BYTES, `${outcome.peakBytes} bytes of memory`);
    }
  });
});

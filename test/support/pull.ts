// Pulls within the test's own process: a clock that does not wait, an environment and a certs.d of
// the test's own, and what has to be in a tar. All that a user would read is kept for the search
// for secrets at the end of the suite.
import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { inspect } from "node:util";
import {
  type ErrorCode,
  ImgpullError,
  internals,
  type PullerOpts,
  type PullResult,
} from "../../imgpull.ts";
import { cleanEnvironment, recordOutput, type TestScope, temporaryFolder } from "./command.ts";
import {
  type Algorithm,
  digestOf,
  readTar,
  type TestContent,
  type TestImage,
  type TestIndex,
} from "./image.ts";
import {
  type Registry,
  type RegistryOptions,
  type RequestRecord,
  type Rule,
  startRegistry,
} from "./registry.ts";

/**
 * The name that every image gets, so that tars pulled from registries on several ports can be
 * compared.
 */
export const NAME = "example.com/team/app:1.0";
export const LINUX = { scheme: "http", osType: "linux", archType: "amd64" } as const;

// ====== Pulling ======

export interface Destination {
  folder: string;
  dest: string;
}

export interface Served extends Destination {
  registry: Registry;
  reference: string;
}

/**
 * A registry with this content as team/app:1.0, and an empty folder for `dest`, which is app.tar in
 * it.
 */
export async function serve(
  t: TestScope,
  content: TestContent,
  options: RegistryOptions = {},
): Promise<Served> {
  const registry = await startRegistry(options, t);
  const folder = temporaryFolder(t);
  return {
    registry,
    reference: registry.add(content, "team/app", "1.0"),
    folder,
    dest: join(folder, "app.tar"),
  };
}

export interface PullOptions extends Partial<Omit<PullerOpts, "url">> {
  /** Laid over the clean environment of command.ts. */
  environment?: Record<string, string | undefined>;
  /** In place of /etc/docker/certs.d. */
  certsDirectory?: string;
  now?: () => number;
  /** What refers to the image comes too; and one of these keys must have signed it. */
  referrers?: boolean;
  signers?: ReturnType<typeof internals.parsePublicKey>[];
  isAll?: boolean;
  several?: readonly { os: string; architecture: string }[];
  /** Called at each wait before another attempt; the wait lasts until what it returns settles. */
  onSleep?: (milliseconds: number, signal: AbortSignal) => unknown;
}

/** What a pull said and did besides its result, as far as it got. */
interface Talk {
  warnings: string[];
  /**
   * Each wait before another attempt, in milliseconds; random is 1, so these are the longest ones.
   */
  waitsMs: number[];
}

interface Job {
  reference: string;
  /** What the image is called in the tar. */
  name: string;
  dest: string | NodeJS.WritableStream;
}

/** Waits cost nothing unless `onSleep` says so; `talk` is filled as the pull goes on. */
async function run({ reference, name, dest }: Job, options: PullOptions, talk: Talk) {
  const { environment: changes = {}, certsDirectory, now = Date.now, onSleep, ...rest } = options;
  const {
    referrers = false,
    signers = [],
    isAll = false,
    several = "one" as const,
    reuse = [],
    since,
    ...opts
  } = rest;
  const clock = {
    now,
    random: () => 1,
    sleep: async (milliseconds: number, signal: AbortSignal) => {
      talk.waitsMs.push(milliseconds);
      await onSleep?.(milliseconds, signal);
    },
  };
  const onWarning = (message: string): void => {
    recordOutput(`${message}\n`);
    talk.warnings.push(message);
  };
  const images = [{ reference: internals.parseReference(reference), name }];
  const choice = isAll ? ("all" as const) : several;
  const what = { images, destination: dest, choice };
  const request = { ...what, reuse, since, referrers, signers };
  const environment = { ...cleanEnvironment(), ...changes };
  return await internals.withSession(
    { url: reference, osType: "linux", archType: "amd64", onWarning, ...opts },
    async (session) => await internals.runPull(session, request, () => undefined),
    { clock, environment, ...(certsDirectory !== undefined && { certsDirectory }) },
  );
}

export interface Pulled extends Talk {
  fetchedBytes: number;
}

/**
 * A pull over plain HTTP that is expected to end well: it throws what it fails with. The image is
 * called NAME.
 */
export async function pull(
  reference: string,
  dest: string | NodeJS.WritableStream,
  options: PullOptions = {},
): Promise<Pulled> {
  const talk: Talk = { warnings: [], waitsMs: [] };
  const job = { reference, name: options.name ?? NAME, dest };
  const { counts } = await run(job, { scheme: "http", ...options }, talk);
  return { fetchedBytes: counts.fetchedBytes, ...talk };
}

/** A pull with sources, of which the transfer and the plan are wanted too. */
export function pullWhole(
  reference: string,
  destination: string,
  opts: { concurrency?: number; reuse?: string[] } = {},
): Promise<Awaited<ReturnType<typeof internals.runPull>>> {
  const { reuse = [], ...more } = opts;
  const images = [{ reference: internals.parseReference(reference), name: NAME }];
  const clock = { now: Date.now, random: () => 0, sleep: async () => undefined };
  return internals.withSession(
    { url: reference, ...LINUX, ...more },
    (session) => internals.runPull(session, { images, destination, reuse }, () => undefined),
    { clock, environment: cleanEnvironment() },
  );
}

export interface Outcome extends Talk {
  result: PullResult | undefined;
  error: ImgpullError | undefined;
  tar: string;
}

/** What Puller's pullTar() makes of a pull of one image. */
export function resultOf({
  images: [image],
  sizeBytes,
  counts,
}: Awaited<ReturnType<typeof internals.runPull>>): PullResult {
  assert.ok(image);
  const { name, digest, platform, layers } = internals.pulledImage(image);
  return { name, digest, platform, layers, sizeBytes, fetchedBytes: counts.fetchedBytes };
}

/** The guard against hanging: the pull then ends as ABORTED. */
const GUARD_MS = 20_000;

/**
 * A pull as `imgpull REFERENCE` makes it, which may fail; anything but an ImgpullError is a bug and
 * fails the test.
 */
export async function tryPull(
  t: TestScope,
  reference: string,
  options: PullOptions = {},
): Promise<Outcome> {
  const tar = join(temporaryFolder(t), "image.tar");
  const outcome: Outcome = { result: undefined, error: undefined, warnings: [], waitsMs: [], tar };
  try {
    const parsed = internals.parseReference(reference);
    const name = internals.formatReference(internals.imageName(parsed, options.namespace));
    const guarded = { signal: AbortSignal.timeout(GUARD_MS), ...options };
    outcome.result = resultOf(await run({ reference, name, dest: tar }, guarded, outcome));
  } catch (error) {
    // With its causes and all their fields, as a program may log it; without the lines of the
    // stack.
    recordOutput(`${inspect(error, { depth: 20 }).replace(/^ +at .*$/gm, "")}\n`);
    if (!(error instanceof ImgpullError)) throw error;
    outcome.error = error;
  }
  return outcome;
}

/**
 * The first connection for a blob stops after so many bytes until there is another: this is what a
 * line is to the module that is worth several connections. Something small that is asked for once
 * more takes longer than any first answer did: were it sooner there, as it is on a busy machine,
 * the registry would look like a cache, which gets no ranges.
 */
export function makeSlow(registry: Registry, digest: string, after = 300_000): Rule {
  const startedMs = performance.now();
  const isAnother = (request: RequestRecord) =>
    request.digest !== digest && registry.blobRequests(request.digest).length > 1;
  registry.on(
    { kind: "blob", where: isAnother },
    {
      handler: async (_request, _response, next) => {
        await pause(performance.now() - startedMs);
        await next();
      },
    },
  );

  const until = registry.arrived({ digest }, 2);
  return registry.on({ digest, times: 1 }, { pause: { after, until } });
}

/**
 * The error that something ends with; anything but an ImgpullError would be a stack trace for the
 * user.
 */
export async function failure(running: Promise<unknown>): Promise<ImgpullError> {
  const error: unknown = await running.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof ImgpullError))
    assert.fail(`no ImgpullError but ${String((error as Error)?.stack ?? error)}`);
  recordOutput(error.message);
  return error;
}

// ====== What has to be there ======

export function childOf(index: TestIndex, at = 0): TestImage {
  return index.children[at] as TestImage;
}

export function blobName(digest: string): string {
  return `blobs/${digest.replace(":", "/")}`;
}

/** Config and layers, each once, in the manifest's order. */
export function blobsOf(...images: TestImage[]): string[] {
  return [
    ...new Set(
      images.flatMap(({ config, layers }) => [
        config.digest,
        ...layers.map(({ digest }) => digest),
      ]),
    ),
  ];
}

export function blobBytes(image: TestImage): number {
  return [...image.blobs.values()].reduce((sum, { length }) => sum + length, 0);
}

/**
 * The files of a tar by name, as a strict reader sees them, every blob compared with its digest.
 */
export function filesOf(tar: Buffer): Map<string, Buffer> {
  const entries = readTar(tar);
  const folders = entries.filter(({ type }) => type === "5");
  assert.deepEqual(entries.slice(0, folders.length), folders, "folders come first");
  assert.deepEqual(folders.map(({ name, mode }) => [name, mode]).slice(0, 2), [
    ["blobs/", 0o755],
    ["blobs/sha256/", 0o755],
  ]);
  const files = new Map(
    entries
      .slice(folders.length)
      .map(({ name, offset, size }) => [name, tar.subarray(offset, offset + size)]),
  );
  assert.deepEqual([...files.keys()].slice(0, 3), ["oci-layout", "index.json", "manifest.json"]);
  for (const [name, bytes] of files) {
    const [folder, algorithm, hex] = name.split("/");
    if (folder === "blobs")
      assert.equal(digestOf(bytes, algorithm as Algorithm), `${algorithm}:${hex}`, name);
  }
  return files;
}

/** A tar holds this image, all of it, and nothing else. */
export function checkTar(tar: Buffer, image: TestContent): void {
  const { config, layers } = JSON.parse(image.bytes.toString("utf8"));
  const blobs = [image, config, ...layers].map(({ digest }) => blobName(digest));
  assert.deepEqual([...filesOf(tar).keys()].slice(3), [...new Set(blobs)]);
}

const undisturbed = new Map<TestContent, Promise<Buffer>>();

/** The tar that a registry without any fault gives. */
export function undisturbedTar(t: TestScope, content: TestContent): Promise<Buffer> {
  const known =
    undisturbed.get(content) ??
    (async () => {
      const { reference, dest } = await serve(t, content);
      await pull(reference, dest);
      checkTar(readFileSync(dest), "children" in content ? childOf(content as TestIndex) : content);
      return readFileSync(dest);
    })();
  undisturbed.set(content, known);
  return known;
}

/** DEST is right to the byte, and nothing else is left in its folder. */
export async function assertRight(
  t: TestScope,
  { folder, dest }: Destination,
  content: TestContent,
  names = ["app.tar"],
): Promise<void> {
  assert.ok(
    readFileSync(dest).equals(await undisturbedTar(t, content)),
    "differs from an undisturbed pull",
  );
  assert.deepEqual(readdirSync(folder).sort(), names);
}

/** DEST is as it was ("precious"), and beside it is at most what the next run resumes from. */
export function assertUntouched({ folder, dest }: Destination): void {
  assert.equal(readFileSync(dest, "utf8"), "precious");
  const others = readdirSync(folder).filter((name) => name !== "app.tar");
  assert.deepEqual(
    others.filter((name) => !name.startsWith("app.tar.partial") || name.endsWith(".lock")),
    [],
  );
}

// ====== How a pull ended ======

/**
 * DEST is there with every manifest and blob of this image, byte for byte, and nothing beside it.
 */
export function assertPulled(outcome: Outcome, image: TestContent): void {
  if (outcome.error) throw outcome.error;
  const tar = readFileSync(outcome.tar);
  const entries = new Map(readTar(tar).map((entry) => [entry.name, entry]));
  for (const digest of [...image.manifests.keys(), ...image.blobs.keys()]) {
    const entry = entries.get(`blobs/${digest.replace(":", "/")}`);
    assert(entry, `${digest} is missing`);
    const bytes = tar.subarray(entry.offset, entry.offset + entry.size);
    assert.equal(digestOf(bytes, digest.startsWith("sha512:") ? "sha512" : "sha256"), digest);
  }
  assert(!existsSync(`${outcome.tar}.partial`), "a partial file is left");
}

/** It failed with this code and these words, in at most three lines, and DEST is not there. */
export function assertFailed(
  outcome: Outcome,
  code: ErrorCode,
  ...words: (RegExp | string)[]
): void {
  const { error } = outcome;
  assert(error, "it did not fail");
  assert.equal(error.code, code, error.message);
  for (const word of words) {
    if (typeof word === "string")
      assert(error.message.includes(word), `no "${word}" in: ${error.message}`);
    else assert.match(error.message, word);
  }
  assert(error.message.split("\n").length <= 3, `too long: ${error.message}`);
  assert(!existsSync(outcome.tar), "DEST is there");
}

// Pulls inside the test's own process: a clock without waiting, one name for every tar, and what has to be in a tar.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { ImgpullError, internals, type PullerOpts } from "../../imgpull.ts";
import { cleanEnvironment, recordOutput, type TestScope, temporaryFolder } from "./command.ts";
import {
  type Algorithm,
  digestOf,
  readTar,
  type TestContent,
  type TestImage,
  type TestIndex,
} from "./image.ts";
import { type Registry, type RegistryOptions, startRegistry } from "./registry.ts";

/** The name that every image gets, so that tars pulled from registries on several ports can be compared. */
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

/** A registry with this content as team/app:1.0, and an empty folder for `dest`, which is app.tar in it. */
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

export interface Pulled {
  fetchedBytes: number;
  warnings: string[];
  waitsMs: number[];
}

export interface PullOptions extends Partial<PullerOpts> {
  sleep?: (milliseconds: number) => Promise<void>;
}

/** A pull whose back-off takes no time unless `sleep` says so; `waitsMs` is what it would have waited. */
export async function pull(
  reference: string,
  dest: string,
  { sleep, ...opts }: PullOptions = {},
): Promise<Pulled> {
  const warnings: string[] = [];
  const waitsMs: number[] = [];
  const clock = {
    now: Date.now,
    random: () => 0,
    sleep: async (milliseconds: number) => {
      waitsMs.push(milliseconds);
      await sleep?.(milliseconds);
    },
  };
  const onWarning = (message: string): void => {
    recordOutput(message);
    warnings.push(message);
  };
  const images = [{ reference: internals.parseReference(reference), name: NAME }];
  return await internals.withSession(
    { url: reference, ...LINUX, onWarning, ...opts },
    async (session) => {
      const request = { images, destination: dest, isAll: false, reuse: [] };
      const { transfer } = await internals.pullImages(session, request, () => undefined);
      return { fetchedBytes: transfer.fetchedBytes, warnings, waitsMs };
    },
    { clock, environment: cleanEnvironment() },
  );
}

/** Answers a manifest only after the line has been silent for a while: this is what "far" means to the module. */
export function makeFar(registry: Registry): void {
  registry.on(
    { kind: "manifest" },
    {
      handler: async (_request, _response, next) => {
        const since = performance.now();
        while (performance.now() - since < 3 * internals.TUNING.farLatencyMs)
          await new Promise(setImmediate);
        await next();
      },
    },
  );
}

/** The error that something ends with; anything but an ImgpullError would be a stack trace for the user. */
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

/** The files of a tar by name, as a strict reader sees them, every blob compared with its digest. */
export function filesOf(tar: Buffer): Map<string, Buffer> {
  const files = new Map(
    readTar(tar).map(({ name, offset, size }) => [name, tar.subarray(offset, offset + size)]),
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
): Promise<void> {
  assert.ok(
    readFileSync(dest).equals(await undisturbedTar(t, content)),
    "differs from an undisturbed pull",
  );
  assert.deepEqual(readdirSync(folder), ["app.tar"]);
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

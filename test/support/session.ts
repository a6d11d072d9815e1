// Pulls within the test's own process, with an environment, a clock and a certs.d of the test's own. Waits cost
// nothing; all that a user would read is kept for the search for secrets at the end of the suite.
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { inspect } from "node:util";
import {
  type ErrorCode,
  ImgpullError,
  internals,
  type PullerOpts,
  type PullResult,
} from "../../imgpull.ts";
import { cleanEnvironment, recordOutput, type TestScope, temporaryFolder } from "./command.ts";
import { digestOf, readTar, type TestContent } from "./image.ts";

export interface PullOptions extends Omit<PullerOpts, "url"> {
  /** Laid over the clean environment of command.ts. */
  environment?: Record<string, string | undefined>;
  /** In place of /etc/docker/certs.d. */
  certsDirectory?: string;
  destination?: string;
  now?: () => number;
  /** Called at each wait before another attempt; the wait lasts until what it returns settles. */
  onSleep?: (milliseconds: number) => unknown;
}

export interface Outcome {
  result: PullResult | undefined;
  error: ImgpullError | undefined;
  warnings: string[];
  /** Each wait before another attempt, in milliseconds; random is 1, so these are the longest ones. */
  sleeps: number[];
  tar: string;
}

/** The guard against hanging: the pull then ends as ABORTED. */
const GUARD_MS = 20_000;

/** Anything but an ImgpullError is a bug and fails the test. */
export async function pull(
  t: TestScope,
  reference: string,
  options: PullOptions = {},
): Promise<Outcome> {
  const {
    environment: changes = {},
    certsDirectory,
    destination,
    now = Date.now,
    onSleep,
    ...given
  } = options;
  const tar = destination ?? join(temporaryFolder(t), "image.tar");
  const outcome: Outcome = { result: undefined, error: undefined, warnings: [], sleeps: [], tar };
  const opts: PullerOpts = {
    url: reference,
    osType: "linux",
    archType: "amd64",
    signal: AbortSignal.timeout(GUARD_MS),
    onWarning: (message) => outcome.warnings.push(message),
    ...given,
  };
  const environment = { ...cleanEnvironment(), ...changes };
  const clock = {
    now,
    random: () => 1,
    sleep: async (milliseconds: number) => {
      outcome.sleeps.push(milliseconds);
      await onSleep?.(milliseconds);
    },
  };
  try {
    const parsed = internals.parseReference(reference);
    const name = internals.formatReference(internals.imageName(parsed, opts.namespace));
    const request = {
      images: [{ reference: parsed, name }],
      destination: tar,
      isAll: false,
      reuse: [],
    };
    const replaced = {
      environment,
      clock,
      ...(certsDirectory !== undefined && { certsDirectory }),
    };
    const { results } = await internals.withSession(
      opts,
      async (session) => await internals.pullImages(session, request, () => {}),
      replaced,
    );
    outcome.result = results[0];
  } catch (error) {
    // With its causes and all their fields, as a program may log it; without the lines of the stack.
    recordOutput(`${inspect(error, { depth: 20 }).replace(/^ +at .*$/gm, "")}\n`);
    if (!(error instanceof ImgpullError)) throw error;
    outcome.error = error;
  } finally {
    recordOutput(`${outcome.warnings.join("\n")}\n`);
  }
  return outcome;
}

/** DEST is there with every manifest and blob of this image, byte for byte, and nothing beside it. */
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

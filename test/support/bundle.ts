// Three images, two of them on one base, on one registry; and the entries of index.json and
// manifest.json.
import assert from "node:assert/strict";
import type { TestContext } from "node:test";
import { type CommandOptions, type CommandResult, runCommand, temporaryFolder } from "./command.ts";
import { makeImage, makeLayer, makeMultiPlatform } from "./image.ts";
import { childOf } from "./pull.ts";
import { type Registry, type RegistryOptions, startRegistry } from "./registry.ts";

export const OPTIONS = ["--scheme", "http", "--platform", "linux/amd64"];

export async function succeed(
  args: string[],
  options: CommandOptions = {},
): Promise<CommandResult> {
  const result = await runCommand(args, options);
  assert.equal(result.exitCode, 0, result.stderr);
  return result;
}

export const PLATFORMS = ["linux/arm64", "linux/amd64"];
export const BASE = [
  makeLayer({ seed: "base-1", sizeBytes: 60_000 }),
  makeLayer({ seed: "base-2" }),
];
export const FIRST = makeMultiPlatform(PLATFORMS, {
  seed: "first",
  layers: [...BASE, makeLayer({ seed: "first" })],
});
export const SECOND = makeMultiPlatform(PLATFORMS, {
  seed: "second",
  layers: [...BASE, makeLayer({ seed: "second" })],
});
export const THIRD = makeImage({ seed: "third", format: "docker", layers: [9000] });
export const IMAGES = [childOf(FIRST, 1), childOf(SECOND, 1), THIRD];

export interface Bundle {
  registry: Registry;
  folder: string;
  references: [string, string, string];
}

export async function serveBundle(t: TestContext, options: RegistryOptions = {}): Promise<Bundle> {
  const registry = await startRegistry(options, t);
  const references: Bundle["references"] = [
    registry.add(FIRST, "team/first", "1.0"),
    registry.add(SECOND, "team/second", "2.0"),
    registry.add(THIRD, "third", "3"),
  ];
  return { registry, references, folder: temporaryFolder(t) };
}

export interface IndexEntry {
  mediaType: string;
  digest: string;
  size: number;
  annotations?: Record<string, string>;
}
export interface DockerEntry {
  Config: string;
  RepoTags: string[];
  Layers: string[];
}

export function indexEntries(files: Map<string, Buffer>): IndexEntry[] {
  return JSON.parse(String(files.get("index.json"))).manifests;
}

export function refNames(entries: IndexEntry[]): (string | undefined)[] {
  return entries.map(({ annotations }) => annotations?.["org.opencontainers.image.ref.name"]);
}

export function dockerEntries(files: Map<string, Buffer>): DockerEntry[] {
  return JSON.parse(String(files.get("manifest.json")));
}

export function fetched(registry: Registry): (string | undefined)[] {
  return registry
    .blobRequests()
    .map(({ digest }) => digest)
    .sort();
}

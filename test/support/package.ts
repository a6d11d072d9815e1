// The package as npm makes it from this folder, and as npm installs it: once for each test process.
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { cleanEnvironment } from "./command.ts";

let cache: string | undefined;

/** Runs npm without this machine's settings and without a network; gives its stdout. */
export async function npm(
  args: string[],
  cwd: string,
  changes: Record<string, string> = {},
): Promise<string> {
  cache ??= newFolder();
  const quiet = {
    npm_config_offline: "true",
    npm_config_update_notifier: "false",
    npm_config_loglevel: "error",
    npm_config_cache: cache,
  };
  const env = {
    ...cleanEnvironment(),
    ...quiet,
    npm_config_fund: "false",
    npm_config_audit: "false",
    ...changes,
  };
  return (await promisify(execFile)("npm", args, { cwd, env, timeout: 120_000 })).stdout;
}

export interface PackedFile {
  path: string;
  mode: number;
}
export interface Packed {
  tarball: string;
  files: PackedFile[];
  integrity: string;
  shasum: string;
}

function newFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "imgpull-package-"));
  process.once("exit", () => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

let packing: Promise<Packed> | undefined;

/** `npm pack`, without its scripts. */
export function packPackage(): Promise<Packed> {
  packing ??= (async () => {
    const folder = newFolder();
    const args = ["pack", "--json", "--ignore-scripts", "--pack-destination", folder];
    const [packed] = JSON.parse(await npm(args, process.cwd()));
    return { ...packed, tarball: join(folder, packed.filename) };
  })();
  return packing;
}

let installing: Promise<string> | undefined;

/** A folder in whose node_modules npm has installed the package, from the .tgz alone. */
export function installedPackage(): Promise<string> {
  installing ??= (async () => {
    const { tarball } = await packPackage();
    const folder = newFolder();
    writeFileSync(
      join(folder, "package.json"),
      JSON.stringify({ name: "consumer", private: true }),
    );
    await npm(["install", tarball], folder);
    return folder;
  })();
  return installing;
}

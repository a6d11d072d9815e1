// Node executables of the lines that the script promises to run on, from npm's packages of them.
// Kept under build/, where the next run finds them.
import { execFile } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, renameSync, rmSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { promisify } from "node:util";

/** The oldest one promised, and the last of each line that is maintained. */
export const NODE_VERSIONS = ["20.19.0", "22.23.3", "24.21.0", "26.10.0"];
/** The last of the lines before, which people still have. */
export const TOO_OLD_NODES = ["16.20.2", "18.20.8"];
/** The one whose permission model knows of the network. */
export const NEWEST_NODE = NODE_VERSIONS.at(-1) as string;

/** As npm's packages are named: linux-x64, win-x64 … */
export const HOST_TARGET = `${process.platform === "win32" ? "win" : process.platform}-${process.arch}`;

const executableOf = (target: string) => (target.startsWith("win-") ? "node.exe" : "node");

async function fetchNode(version: string, target: string, executable: string): Promise<void> {
  const packed = `node-${target}@${version}`;
  const folder = resolve("build/nodes");
  mkdirSync(folder, { recursive: true });
  const unpacked = mkdtempSync(join(folder, "unpacking-"));
  try {
    // npm compares what it fetches with the SHA-512 of its index.
    const flags = [
      "--silent",
      "--pack-destination",
      unpacked,
      "--fetch-retries=1",
      "--fetch-retry-mintimeout=1000",
    ];
    const { stdout } = await promisify(execFile)("npm", ["pack", packed, ...flags], {
      timeout: 300_000,
    });
    const inside = `package/bin/${executableOf(target)}`;
    await promisify(execFile)("tar", [
      "-xzf",
      join(unpacked, stdout.trim()),
      "-C",
      unpacked,
      inside,
    ]);
    mkdirSync(dirname(executable), { recursive: true });
    renameSync(join(unpacked, inside), executable); // in one step: another test process may fetch the same one
  } finally {
    rmSync(unpacked, { recursive: true, force: true });
  }
}

type NodeExecutable = { path: string } | { missing: string };
const known = new Map<string, Promise<NodeExecutable>>();

/**
 * The executable of a version; or, where it cannot be fetched, a reason to skip. With
 * IMGPULL_INTEROP=required, as CI sets it, that is an error.
 */
export function nodeExecutable(version: string, target = HOST_TARGET): Promise<NodeExecutable> {
  const name = `${target} ${version}`;
  const looking = known.get(name) ?? findNode(version, target);
  known.set(name, looking);
  return looking;
}

async function findNode(version: string, target: string): Promise<NodeExecutable> {
  if (process.versions.node === version && target === HOST_TARGET)
    return { path: process.execPath };
  const place = target === HOST_TARGET ? version : `${target}-${version}`;
  const path = resolve("build/nodes", place, "bin", executableOf(target));
  try {
    if (!existsSync(path)) await fetchNode(version, target, path);
    return { path };
  } catch (error) {
    const missing = `missing here: Node ${version} for ${target}`;
    if (process.env.IMGPULL_INTEROP === "required")
      throw new Error(`${missing}: required`, { cause: error });
    console.error(`\n*** TESTS SKIPPED, ${missing} (npm pack) ***\n`);
    return { missing };
  }
}

// npm run demo: a registry on loopback, a multi-platform image, and the real command that pulls it.
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, rmSync } from "node:fs";
import { join, resolve } from "node:path";
import { COMMAND_PATH, cleanEnvironment } from "./support/command.ts";
import { makeMultiPlatform, readTar, type TarEntry } from "./support/image.ts";
import { type RequestRecord, startRegistry } from "./support/registry.ts";

const FOLDER = resolve("build/demo");
const TAR = join(FOLDER, "hello.tar");
const MEBIBYTE = 1024 * 1024;

function print(line = ""): void {
  process.stdout.write(`${line}\n`);
}

function grouped(value: number): string {
  return value.toLocaleString("en-US");
}

function row(cells: (string | number)[], widths: number[]): string {
  const padded = cells.map((cell, column) => {
    const width = widths[column] ?? 0;
    return typeof cell === "number" ? grouped(cell).padStart(width) : cell.padEnd(width);
  });
  return `  ${padded.join("  ").trimEnd()}`;
}

/** Its stderr is ours, so that progress looks as it does for a user. */
async function run(args: string[]): Promise<{ exitCode: number | null; stdout: string }> {
  const child = spawn(process.execPath, [COMMAND_PATH, ...args], {
    cwd: FOLDER,
    env: cleanEnvironment(),
    stdio: ["ignore", "pipe", "inherit"],
  });
  let stdout = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    stdout += text;
  });
  return new Promise((done, failed) => {
    child.once("error", failed);
    child.once("close", (exitCode) => done({ exitCode, stdout }));
  });
}

function printEntries(tar: Buffer, entries: TarEntry[]): void {
  const widths = [79, 12, 12];
  print(row(["entry", "      offset", "        size"], widths));
  for (const { name, offset, size } of entries) print(row([name, offset, size], widths));
  print(`  in all ${grouped(tar.length)} bytes`);
}

function printRequests(requests: RequestRecord[]): void {
  for (const { connection, status, bytesSent, method, url, range } of requests) {
    const shortened = url.replace(/(sha256:[0-9a-f]{12})[0-9a-f]{52}/g, "$1…");
    const line = `${method} ${shortened}${range === undefined ? "" : ` (${range})`}`;
    print(row([`connection ${connection}`, status, bytesSent, line], [13, 3, 10]));
  }
}

function damagedEntries(tar: Buffer, entries: TarEntry[]): TarEntry[] {
  return entries.filter(({ name, offset, size }) => {
    const hex = /^blobs\/sha256\/(.+)$/.exec(name)?.[1];
    const bytes = tar.subarray(offset, offset + size);
    return hex !== undefined && createHash("sha256").update(bytes).digest("hex") !== hex;
  });
}

async function demo(): Promise<boolean> {
  if (!existsSync(COMMAND_PATH)) throw new Error("dist/imgpull.cjs is not built: node build.mjs");
  rmSync(FOLDER, { recursive: true, force: true });
  mkdirSync(FOLDER, { recursive: true });
  const registry = await startRegistry();
  try {
    const platforms = ["linux/amd64", "linux/arm64", "linux/arm/v7"];
    const image = makeMultiPlatform(platforms, {
      seed: "hello",
      layers: [12 * MEBIBYTE, 3 * MEBIBYTE],
    });
    const reference = registry.add(image, "demo/hello", "1.0");
    print(`A registry on ${registry.url} holds demo/hello:1.0 for ${platforms.join(", ")}.`);
    print();

    const args = [reference, "hello.tar", "--scheme", "http"];
    print(`$ imgpull ${args.join(" ")}`);
    const { exitCode, stdout } = await run(args);
    process.stdout.write(stdout);
    print();
    if (exitCode !== 0) {
      print(`The command failed with exit code ${exitCode}.`);
      return false;
    }

    const tar = readFileSync(TAR);
    const entries = readTar(tar);
    print("The tar:");
    printEntries(tar, entries);
    print();
    print(
      "What the registry was asked, on which connection, its status, and the bytes of its answer:",
    );
    printRequests(registry.requests);
    print();

    const damaged = damagedEntries(tar, entries);
    for (const { name } of damaged) print(`Wrong bytes in ${name}.`);
    if (entries.length < 9) print(`The tar has only ${entries.length} entries.`);
    print(
      "Left in build/demo/hello.tar; docker load, podman load, ctr images import and skopeo take it.",
    );
    return damaged.length === 0 && entries.length >= 9;
  } finally {
    await registry.close();
  }
}

process.exitCode = (await demo()) ? 0 : 1;

// Runs the built command as its user would, in an environment that holds nothing of this machine's.
import { type ChildProcess, spawn } from "node:child_process";
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";

// ====== Secrets ======

/**
 * Every secret that a test uses: none may ever be seen in an output or a file. USER is not one of
 * them.
 */
export const SECRETS = {
  password: "s3cr3t-password-kX81vQ",
  /** What --token is given, and what a registry with `auth.outsideToken` takes as `Basic TOKEN`. */
  outsideToken: "czNjcjN0LW91dHNpZGUtdG9rZW4tUWo3",
  /** Bearer tokens of the test registry are this plus a number. */
  bearerToken: "s3cr3t-bearer-Zp52hR-",
  identityToken: "s3cr3t-identity-Lw90sD",
  /** Signatures of the storage server's URLs are this plus a number. */
  signature: "s3cr3t-signature-Tn46cY-",
  proxyPassword: "s3cr3t-proxy-Hb73mE",
} as const;

export const USER = "tester";

/**
 * The secrets in each form in which they could leak: plain, and as part of a Base64 text at each of
 * its alignments.
 */
export function secretForms(): string[] {
  return Object.values(SECRETS).flatMap((secret) => [
    secret,
    ...[0, 1, 2].map((shift) => {
      const encoded = Buffer.from(" ".repeat(shift) + secret)
        .toString("base64")
        .replace(/=+$/, "");
      return encoded.slice(shift === 0 ? 0 : shift + 1, -2);
    }),
  ]);
}

// ====== Output seen ======

export const SEEN_OUTPUT_FOLDER = resolve("build/test-output");
const SEEN_AT_MOST = 1024 * 1024;

/**
 * Keeps an output for the search for secrets at the end of the suite (of a tar on stdout, only the
 * first MiB).
 */
export function recordOutput(output: Buffer | string): void {
  mkdirSync(SEEN_OUTPUT_FOLDER, { recursive: true });
  appendFileSync(
    join(SEEN_OUTPUT_FOLDER, `${process.pid}.log`),
    Buffer.from(output).subarray(0, SEEN_AT_MOST),
  );
}

/** All output that test processes have recorded since the folder was last removed, by file name. */
export function seenOutput(): Map<string, string> {
  const names = existsSync(SEEN_OUTPUT_FOLDER) ? readdirSync(SEEN_OUTPUT_FOLDER) : [];
  return new Map(
    names.map((name) => [name, readFileSync(join(SEEN_OUTPUT_FOLDER, name), "latin1")]),
  );
}

// ====== Folders ======

/** The part of node:test's context that is used here. */
export interface TestScope {
  after(cleanUp: () => unknown): void;
}

export function temporaryFolder(t: TestScope): string {
  const folder = mkdtempSync(join(tmpdir(), "imgpull-test-"));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

// ====== Commands ======

export interface CommandOptions {
  cwd?: string;
  /** Laid over the clean environment; undefined takes a variable out of it. */
  env?: Record<string, string | undefined>;
  /** Default: an empty stdin. "open": a pipe that is left to the caller (`child.stdin`). */
  stdin?: string | Buffer | "open";
  /** When aborted, the command is sent `killSignal` (default SIGINT); the result still comes. */
  signal?: AbortSignal;
  killSignal?: NodeJS.Signals;
  onStdout?: (chunk: Buffer) => void;
  onStderr?: (text: string) => void;
  /** By this Node and as a script, whatever IMGPULL_BINARY says. */
  nodePath?: string;
  /** The same, with options before the script: `["--permission", …]`. */
  nodeArgs?: string[];
  /** Instead of node and the script: a binary, `[nodePath, "-"]` … */
  command?: [string, ...string[]];
  /** The guard against hanging, default 60 s: the command is killed and the promise rejects. */
  guardMs?: number;
}

export interface CommandResult {
  /** null when a signal ended it, which `signal` then names. */
  exitCode: number | null;
  signal: NodeJS.Signals | null;
  stdout: Buffer;
  stderr: string;
}

export interface RunningCommand {
  child: ChildProcess;
  result: Promise<CommandResult>;
}

export const COMMAND_PATH = resolve("dist/imgpull.cjs");
const { IMGPULL_BINARY } = process.env;
/**
 * How the command is run: by node as a script or, where IMGPULL_BINARY names one, as a binary of
 * its own.
 */
export const COMMAND: [string, ...string[]] = IMGPULL_BINARY
  ? [resolve(IMGPULL_BINARY)]
  : [process.execPath, COMMAND_PATH];

let emptyHome: string | undefined;

/**
 * PATH, a HOME and an XDG_RUNTIME_DIR without any file: no proxy, no credentials, no NODE_OPTIONS.
 */
export function cleanEnvironment(): Record<string, string> {
  if (emptyHome === undefined) {
    const made = mkdtempSync(join(tmpdir(), "imgpull-home-"));
    emptyHome = made;
    mkdirSync(join(made, "run"));
    process.once("exit", () => rmSync(made, { recursive: true, force: true }));
  }
  const { PATH = "", SYSTEMROOT = "" } = process.env;
  return {
    ...(process.platform === "win32" && { SYSTEMROOT, TEMP: tmpdir(), USERPROFILE: emptyHome }),
    PATH,
    HOME: emptyHome,
    XDG_RUNTIME_DIR: join(emptyHome, "run"),
    TMPDIR: tmpdir(),
    LANG: "C.UTF-8",
  };
}

function mergedEnvironment(
  changes: Record<string, string | undefined> = {},
): Record<string, string> {
  const merged = Object.entries({ ...cleanEnvironment(), ...changes });
  return Object.fromEntries(
    merged.filter((entry): entry is [string, string] => entry[1] !== undefined),
  );
}

/** Starts the command and gives the process too, for tests that send signals or close pipes. */
export function startCommand(args: string[], options: CommandOptions = {}): RunningCommand {
  const { nodePath, nodeArgs, guardMs = 60_000, killSignal = "SIGINT" } = options;
  const isScript = nodePath !== undefined || nodeArgs !== undefined;
  const script: [string, ...string[]] = [
    nodePath ?? process.execPath,
    ...(nodeArgs ?? []),
    COMMAND_PATH,
  ];
  const [program, ...words] = options.command ?? (isScript ? script : COMMAND);
  const child = spawn(program, [...words, ...args], {
    cwd: options.cwd ?? process.cwd(),
    env: mergedEnvironment(options.env),
    stdio: ["pipe", "pipe", "pipe"],
  });
  const stdout: Buffer[] = [];
  const stderr: Buffer[] = [];
  // A command that ends without reading its stdin gives EPIPE here, which is its right.
  child.stdin.on("error", () => {});
  if (options.stdin !== "open") child.stdin.end(options.stdin ?? "");
  child.stdout.on("data", (chunk: Buffer) => {
    stdout.push(chunk);
    options.onStdout?.(chunk);
  });
  child.stderr.on("data", (chunk: Buffer) => {
    stderr.push(chunk);
    options.onStderr?.(chunk.toString("utf8"));
  });
  const abort = () => child.kill(killSignal);
  options.signal?.addEventListener("abort", abort, { once: true });
  if (options.signal?.aborted) abort();

  const result = new Promise<CommandResult>((done, failed) => {
    let hung = false;
    const guard = setTimeout(() => {
      hung = true;
      child.kill("SIGKILL");
    }, guardMs);
    child.once("error", failed);
    child.once("close", (exitCode, signal) => {
      clearTimeout(guard);
      options.signal?.removeEventListener("abort", abort);
      const text = Buffer.concat(stderr).toString("utf8");
      const output = Buffer.concat(stdout);
      recordOutput(output);
      recordOutput(text);
      if (hung)
        failed(
          new Error(`still running after ${guardMs} ms: ${program} ${args.join(" ")}\n${text}`),
        );
      else done({ exitCode, signal, stdout: output, stderr: text });
    });
  });
  return { child, result };
}

/** Runs the command to its end. */
export function runCommand(args: string[], options: CommandOptions = {}): Promise<CommandResult> {
  return startCommand(args, options).result;
}

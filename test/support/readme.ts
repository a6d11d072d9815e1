// What a reader of the README has: the commands it names on the PATH, and the hosts it names,
// behind a proxy that leads to registries on loopback. So every block runs as it stands there,
// names and all.
import { createHash } from "node:crypto";
import { once } from "node:events";
import {
  accessSync,
  chmodSync,
  constants,
  copyFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { basename, delimiter, join, resolve } from "node:path";
import { makeAuthority } from "./certificates.ts";
import {
  COMMAND_PATH,
  type CommandResult,
  runCommand,
  SECRETS,
  type TestScope,
  temporaryFolder,
} from "./command.ts";
import { makeImage, makeMultiPlatform, type TestContent } from "./image.ts";
import { run } from "./interop.ts";
import { packPackage } from "./package.ts";
import { startProxy } from "./proxy.ts";
import { type Registry, startRegistry } from "./registry.ts";

// ====== The page ======

export interface Block {
  text: string;
  firstLine: string;
}

export function readmeBlocks(language: string): Block[] {
  const fences = readFileSync("README.md", "utf8").matchAll(/^```(\w*)\n([\s\S]*?)^```$/gm);
  const blocks = [...fences].filter(([, name]) => name === language);
  return blocks.map(([, , text = ""]) => ({ text, firstLine: text.split("\n")[0] ?? "" }));
}

/** Where the page says that the newest release's files are. */
export const [LATEST = ""] =
  /https:\/\/github\.com\/[^/]+\/imgpull\/releases\/latest\/download/.exec(
    readFileSync("README.md", "utf8"),
  ) ?? [];

// ====== The reader's machine ======

const PLATFORMS = [...new Set(["amd64", "arm64", process.arch === "x64" ? "amd64" : process.arch])];
const multiPlatform = (seed: string, layers: number[]) =>
  makeMultiPlatform(
    PLATFORMS.map((architecture) => `linux/${architecture}`),
    { seed, layers },
  );

/** What each registry of the page holds, by repository and tag. */
export const IMAGES = {
  "docker.io": {
    "library/alpine:3.22": multiPlatform("alpine 3.22", [60_000]),
    "library/alpine:3.23": multiPlatform("alpine 3.23", [61_000]),
    "library/busybox:1.37": multiPlatform("busybox", [40_000, 7000]),
    "library/hello-world:latest": multiPlatform("hello", [7000]),
  },
  "quay.io": {
    "org/app:1.4": multiPlatform("signed app", [20_000]),
    "prometheus/node-exporter:v1.8.2": multiPlatform("exporter", [50_000, 9000]),
  },
  "registry.corp.example": { "team/app:1.4": makeImage({ seed: "app", platform: "linux/amd64" }) },
  "mirror.corp.example": { "curl/curl:8.10.1": multiPlatform("curl", [30_000]) },
} satisfies Record<string, Record<string, TestContent>>;

export interface Reader {
  /** Where the commands run. */
  folder: string;
  registries: Record<keyof typeof IMAGES, Registry>;
  env: Record<string, string>;
  /** Runs lines in a shell that stops at the first one that fails, in a pipe too. */
  run: (text: string, env?: Record<string, string>) => Promise<CommandResult>;
  /** The same as CI runs a step: `bash -e`. */
  runStep: (text: string) => Promise<CommandResult>;
  /** What the stand-ins were called with: `docker load -i a.tar`, in order. */
  calls: () => string[];
  /** What a stand-in read from its stdin the last time. */
  stdinOf: (program: string) => Buffer;
}

function isOnPath(program: string): boolean {
  return (process.env.PATH ?? "").split(delimiter).some((folder) => {
    try {
      accessSync(join(folder, program), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

const sumOf = (file: string): string =>
  createHash("sha256").update(readFileSync(file)).digest("hex");

/**
 * A release as `node build.mjs --sea` and the workflow leave it; for a binary that is not built,
 * the script.
 */
async function makeRelease(folder: string): Promise<void> {
  mkdirSync(folder);
  copyFileSync(COMMAND_PATH, join(folder, "imgpull.cjs"));
  const archive = "imgpull-linux-x64.tar.gz";
  const built = resolve("dist/bin", archive);
  if (existsSync(built)) {
    copyFileSync(built, join(folder, archive));
  } else {
    copyFileSync(COMMAND_PATH, join(folder, "imgpull"));
    await run(["tar", "-czf", archive, "imgpull"], { cwd: folder });
  }
  const sums = [archive, "imgpull.cjs", "imgpull-win-x64.exe"].map(
    (name) =>
      `${existsSync(join(folder, name)) ? sumOf(join(folder, name)) : "0".repeat(64)}  ${name}\n`,
  );
  writeFileSync(join(folder, "SHA256SUMS"), sums.join(""));
}

/** The release's files, and an npm registry that has the package. */
async function serveFiles(t: TestScope, release: string): Promise<string> {
  const { tarball, integrity, shasum } = await packPackage();
  const server = createServer((request, response) => {
    const url = `http://${request.headers.host}`;
    const name = basename(request.url ?? "");
    const manifest = JSON.parse(readFileSync("package.json", "utf8"));
    const dist = { tarball: `${url}/npm/tgz/${basename(tarball)}`, integrity, shasum };
    const versions = { [manifest.version]: { ...manifest, dist } };
    if (request.url === "/npm/imgpull") {
      const document = { name: "imgpull", "dist-tags": { latest: manifest.version }, versions };
      response.setHeader("content-type", "application/json").end(JSON.stringify(document));
      return;
    }
    const file = request.url?.startsWith("/npm/tgz/") ? tarball : join(release, name);
    if (existsSync(file)) response.end(readFileSync(file));
    else response.writeHead(404).end();
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/**
 * Notes how it was called and all of its stdin, and prints what a test has put there for it; a tar
 * that `-i` names has to be there.
 */
const STAND_IN = `#!/bin/sh
program=$(basename "$0")
echo "$program $*" >> "$STAND_INS/calls"
cat > "$STAND_INS/$program.stdin"
if [ -f "$STAND_INS/$program.stdout" ]; then cat "$STAND_INS/$program.stdout"; fi
while [ $# -gt 0 ]; do
  if [ "$1" = -i ]; then test -s "$2" || exit 1; fi
  shift
done
`;
/** One that does not read stdin, which in a loop has the names that are still to come. */
const LOOPED_STAND_IN = STAND_IN.replace(/^cat .*\n/m, "");
const JQ = `#!/usr/bin/env node
// Of jq, what the page uses.
const [filter] = process.argv.slice(3);
for (const line of require("node:fs").readFileSync(0, "utf8").trim().split("\\n")) {
  const { name, digest } = JSON.parse(line);
  console.log(filter === ".name" ? name : name + " " + digest);
}
`;
const CURL = `#!/usr/bin/env node
// Of curl, what the page uses: -f, -s, -S, -L, -O, -o FILE and --remote-name-all.
const { writeFileSync } = require("node:fs");
const args = process.argv.slice(2);
const at = args.findIndex((arg) => /^-[a-zA-Z]*o$/.test(arg));
const [file] = at < 0 ? [] : args.splice(at + 1, 1);
const isKept = args.some((arg) => /^-[a-zA-Z]*O/.test(arg) || arg === "--remote-name-all");
(async () => {
  for (const url of args.filter((arg) => !arg.startsWith("-"))) {
    const answer = await fetch(url);
    if (!answer.ok) process.exit(22);
    const bytes = Buffer.from(await answer.arrayBuffer());
    if (file) writeFileSync(file, bytes);
    else if (isKept) writeFileSync(url.slice(url.lastIndexOf("/") + 1), bytes);
    else process.stdout.write(bytes);
  }
})();
`;

/** A machine with an empty home for a reader of the page, and an empty folder to work in. */
export async function makeReader(t: TestScope, nodePath = process.execPath): Promise<Reader> {
  const home = temporaryFolder(t);
  const folder = join(home, "work");
  const programs = join(home, "programs");
  const standIns = join(home, "stand-ins");
  for (const made of [folder, programs, standIns]) mkdirSync(made);

  const [publicCa, corporateCa] = [makeAuthority(), makeAuthority("corporate CA")];
  const registries: Partial<Reader["registries"]> = {};
  const hosts: Record<string, string> = {};
  for (const host of Object.keys(IMAGES) as (keyof typeof IMAGES)[]) {
    const isCorporate = host === "registry.corp.example";
    const apiHost = host === "docker.io" ? "registry-1.docker.io" : host;
    const tls = (isCorporate ? corporateCa : publicCa).issueServer({ dns: [apiHost] });
    const basic = { mode: "basic", user: "ci", password: SECRETS.password } as const;
    const registry = await startRegistry({ tls, auth: isCorporate ? basic : "bearer" }, t);
    registries[host] = registry;
    hosts[isCorporate ? `${apiHost}:5000` : apiHost] = registry.host;
    for (const [name, image] of Object.entries<TestContent>(IMAGES[host])) {
      const [repository = "", tag = ""] = name.split(":");
      registry.add(image, repository, tag);
    }
  }
  const proxy = await startProxy(t, { hosts });
  // Beside DEST, where Node's permission model lets it be read.
  writeFileSync(join(folder, "public-ca.pem"), publicCa.cert);
  writeFileSync(join(folder, "corp-ca.pem"), corporateCa.cert);
  writeFileSync(join(folder, "password.txt"), `${SECRETS.password}\n`);

  symlinkSync(COMMAND_PATH, join(programs, "imgpull"));
  symlinkSync(nodePath, join(programs, "node"));
  for (const [name, text] of [
    ["docker", STAND_IN],
    ["podman", STAND_IN],
    ["ssh", STAND_IN],
    ["cosign", STAND_IN],
    ["oras", LOOPED_STAND_IN],
    ["regctl", LOOPED_STAND_IN],
    ["jq", JQ],
    ["helm", STAND_IN],
    ["curl", CURL],
  ] as const) {
    if (["curl", "jq"].includes(name) && isOnPath(name)) continue;
    writeFileSync(join(programs, name), text);
    chmodSync(join(programs, name), 0o755);
  }
  const release = join(home, "release");
  await makeRelease(release);
  const url = await serveFiles(t, release);
  const env = {
    HOME: home,
    HTTPS_PROXY: proxy.url,
    SSL_CERT_FILE: join(folder, "public-ca.pem"),
    RELEASE: `${url}/release`,
    STAND_INS: standIns,
    PATH: [join(home, "global/bin"), programs, process.env.PATH ?? ""].join(delimiter),
    npm_config_registry: `${url}/npm/`,
    npm_config_noproxy: "127.0.0.1",
    npm_config_prefix: join(home, "global"),
    npm_config_update_notifier: "false",
    npm_config_fund: "false",
    npm_config_audit: "false",
  };
  // As it stands there, but for the address of the release.
  const runIn = (flags: string[], text: string, changes: Record<string, string> = {}) =>
    runCommand([], {
      command: ["bash", "--norc", ...flags, "-c", text.replaceAll(LATEST, env.RELEASE)],
      cwd: folder,
      env: { ...env, ...changes },
      guardMs: 120_000,
    });
  const calls = join(standIns, "calls");
  return {
    folder,
    env,
    registries: registries as Reader["registries"],
    run: (text, changes = {}) => runIn(["-euo", "pipefail"], text, changes),
    runStep: (text) => runIn(["-e"], text),
    calls: () => (existsSync(calls) ? readFileSync(calls, "utf8").trimEnd().split("\n") : []),
    stdinOf: (program) => readFileSync(join(standIns, `${program}.stdin`)),
  };
}

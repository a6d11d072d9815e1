// What is shipped: the script, run in each way that people run it, and the library as a consumer
// has it, from the package that npm packs and installs.
import assert from "node:assert/strict";
import {
  accessSync,
  constants,
  cpSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { homedir } from "node:os";
import { join, resolve } from "node:path";
import { test } from "node:test";
import { newPullerOpts, type PullerOpts } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import {
  COMMAND_PATH,
  type CommandOptions,
  type CommandResult,
  runCommand,
  type TestScope,
  temporaryFolder,
} from "./support/command.ts";
import { makeImage, makeMultiPlatform, readTar } from "./support/image.ts";
import { installedPackage, npm, packPackage } from "./support/package.ts";
import { startProxy } from "./support/proxy.ts";
import { type Registry, type RegistryOptions, startRegistry } from "./support/registry.ts";

const node = process.execPath;
const DIST = ["imgpull.cjs", "imgpull.mjs", "imgpull.d.ts", "imgpull.d.mts", "require.cjs"];
const manifest = JSON.parse(readFileSync("package.json", "utf8"));

async function run(
  program: string,
  args: string[],
  options: CommandOptions,
): Promise<CommandResult> {
  const result = await runCommand(args, { ...options, command: [program] });
  assert.equal(result.exitCode, 0, `${result.stdout}${result.stderr}`);
  return result;
}

const image = makeImage({ seed: "dist", platform: "linux/amd64", layers: [70_000, 4096] });

async function serve(t: TestScope, options: RegistryOptions = {}): Promise<Registry> {
  const registry = await startRegistry(options, t);
  registry.add(image, "team/app", "1.0");
  return registry;
}

// ====== The command ======

test("the script by node, on stdin, and through a link called imgpull", async (t) => {
  const registry = await serve(t);
  const script = readFileSync(COMMAND_PATH);
  const folder = temporaryFolder(t);
  symlinkSync(COMMAND_PATH, join(folder, "imgpull"));
  const ways: [string, [string, ...string[]], Buffer | undefined][] = [
    ["by-node.tar", [node, COMMAND_PATH], undefined],
    ["stdin.tar", [node, "-"], script],
    ["link.tar", [join(folder, "imgpull")], undefined],
  ];
  const tars: Buffer[] = [];
  for (const [dest, command, stdin] of ways) {
    const args = [
      `${registry.host}/team/app:1.0`,
      dest,
      "--scheme",
      "http",
      "-o",
      "linux",
      "-a",
      "amd64",
    ];
    const options = { command, cwd: folder, ...(stdin && { stdin }) };
    const { exitCode, stdout, stderr } = await runCommand(args, options);
    assert.deepEqual([exitCode, String(stdout)], [0, `${args[0]}@${image.digest}\n`], stderr);
    tars.push(readFileSync(join(folder, dest)));
    const misused = await runCommand(["--frobnicate"], options);
    assert.deepEqual([misused.exitCode, misused.stderr.split("\n").length], [2, 2], misused.stderr);
  }
  assert.ok(tars.every((tar) => tars[0]?.equals(tar)));
});

test("the script has a shebang, may be executed, is readable, and knows nothing of where it was built", () => {
  const text = readFileSync(COMMAND_PATH, "utf8");
  assert.match(text, /^#!\/usr\/bin\/env node\n/);
  accessSync(COMMAND_PATH, constants.X_OK);
  const lines = text.split("\n");
  assert.ok(lines.length > 1000, "not minified");
  assert.ok(
    lines.every((line) => line.length < 400),
    "not minified",
  );
  for (const name of DIST) {
    const content = readFileSync(join("dist", name), "utf8");
    for (const place of [process.cwd(), homedir()])
      assert.ok(!content.includes(`${place}/`), `${name}: ${place}`);
    assert.doesNotMatch(content, /sourceMappingURL/);
  }
  for (const [, from] of text.matchAll(/\brequire\("([^"]+)"\)/g))
    assert.match(from ?? "", /^node:/);
});

test("dist/ is what the build makes, byte for byte, elsewhere too", async (t) => {
  const folder = temporaryFolder(t);
  const sources = ["build.mjs", "package.json", "tsconfig.json", "imgpull.ts", "CHANGELOG.md"];
  for (const name of sources) cpSync(name, join(folder, name));
  symlinkSync(resolve("node_modules"), join(folder, "node_modules"));
  const elsewhere = { cwd: folder, env: { TZ: "Asia/Tokyo", LANG: "C" } };
  await run("sh", ["-c", 'umask 077; exec "$0" build.mjs', node], elsewhere);
  for (const name of DIST) {
    const rebuilt = readFileSync(join(folder, "dist", name));
    assert.ok(rebuilt.equals(readFileSync(join("dist", name))), `${name} differs: node build.mjs`);
  }
  const [, version, date] =
    /^## (\S+) \((\S+)\)$/m.exec(readFileSync("CHANGELOG.md", "utf8")) ?? [];
  const { stdout } = await runCommand(["--version"]);
  assert.equal(String(stdout), `imgpull version: ${version} build date: ${date}\n`);
  assert.equal(manifest.version, version);
});

test("the package holds these files and no others, and only the command may be executed", async () => {
  const { files, tarball } = await packPackage();
  const wanted = [
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "dist/imgpull.cjs",
    "dist/imgpull.d.mts",
    "dist/imgpull.d.ts",
    "dist/imgpull.mjs",
    "dist/require.cjs",
    "package.json",
  ];
  assert.deepEqual(files.map(({ path }) => path).sort(), wanted);
  assert.deepEqual(
    files.filter(({ mode }) => (mode & 0o111) !== 0).map(({ path }) => path),
    ["dist/imgpull.cjs"],
  );
  // Two builds of at most 350 KB each, which shrink to a third, and the texts.
  assert.ok(statSync(tarball).size < 250_000, `${statSync(tarball).size} bytes`);
  const installed = join(await installedPackage(), "node_modules");
  const visible = readdirSync(installed).filter((name) => !name.startsWith("."));
  assert.deepEqual(visible, ["imgpull"], "it brought something along");
  for (const path of wanted)
    assert.ok(readFileSync(path).equals(readFileSync(join(installed, "imgpull", path))), path);
});

test("the installed command: node_modules/.bin/imgpull, and npx", async (t) => {
  const registry = await serve(t);
  const folder = await makeConsumer(t, { "package.json": '{ "private": true }' });
  const args = [`${registry.host}/team/app:1.0`, "--scheme", "http", "-o", "linux", "-a", "amd64"];
  const pinned = `${args[0]}@${image.digest}\n`;
  const byLink = await run(join(folder, "node_modules/.bin/imgpull"), [...args, "link.tar"], {
    cwd: folder,
  });
  const byNpx = await npm(["exec", "--no", "--", "imgpull", ...args, "npx.tar"], folder);
  assert.deepEqual([String(byLink.stdout), byNpx], [pinned, pinned]);
  assert.ok(readFileSync(join(folder, "link.tar")).equals(readFileSync(join(folder, "npx.tar"))));
});

test("package.json: the command, the types first, no dependency, every file there", () => {
  assert.equal(resolve(manifest.bin.imgpull), COMMAND_PATH);
  const conditions: Record<string, string>[] = Object.values(manifest.exports["."]);
  for (const condition of conditions)
    assert.deepEqual(Object.keys(condition), ["types", "default"]);
  assert.match(manifest.engines.node, /^>=20\.19/);
  const dependencies = Object.keys(manifest).filter((field) => /dependencies$/i.test(field));
  assert.deepEqual(dependencies, ["devDependencies"]);
  const exported = conditions.flatMap((condition) => Object.values(condition));
  for (const file of [...manifest.files, ...exported, manifest.types, manifest.main])
    assert.ok(statSync(file).isFile(), file);
  const packed = new Set(manifest.files.map((file: string) => resolve(file)));
  for (const file of exported) assert.ok(packed.has(resolve(file)), `${file} is not packed`);
});

// ====== A consumer ======

async function makeConsumer(t: TestScope, files: Record<string, string>): Promise<string> {
  const folder = temporaryFolder(t);
  const installed = join(await installedPackage(), "node_modules");
  cpSync(installed, join(folder, "node_modules"), { recursive: true, verbatimSymlinks: true });
  for (const [name, text] of Object.entries(files)) writeFileSync(join(folder, name), text);
  return folder;
}

/**
 * The library's two examples as users were first given them: they have to go on working, word for
 * word.
 */
const FIRST = `const puller = new Puller("docker.io/hello-world:latest");
  const pulled = await puller.pullTar("./hello-world.tar");
  console.log(JSON.stringify(pulled));`;
const ESM = `import { Puller } from "imgpull";\n${FIRST}\n`;
const COMMONJS = `const { Puller } = require("imgpull");\nvoid (async () => {\n${FIRST}\n})();\n`;

test("the library's first example, as ESM and as CommonJS", async (t) => {
  const authority = makeAuthority();
  const files = { "first.mjs": ESM, "first.cjs": COMMONJS, "first.js": COMMONJS };
  const folder = await makeConsumer(t, { ...files, "ca.pem": authority.cert });
  const tls = authority.issueServer({ dns: ["registry-1.docker.io"] });
  const registry = await startRegistry({ tls, auth: "bearer" }, t);
  const { archType = "" } = newPullerOpts("alpine");
  const hello = makeMultiPlatform([...new Set(["linux/amd64", `linux/${archType}`])], {
    seed: "hello",
  });
  registry.add(hello, "library/hello-world", "latest");
  const proxy = await startProxy(t, { hosts: { "registry-1.docker.io": registry.host } });
  const env = { HTTPS_PROXY: proxy.url, SSL_CERT_FILE: join(folder, "ca.pem") };
  for (const file of Object.keys(files)) {
    const { stdout, stderr } = await run(node, [file], { cwd: folder, env });
    assert.equal(stderr, "", file);
    const { name, platform, sizeBytes } = JSON.parse(String(stdout));
    assert.deepEqual(
      [name, platform],
      ["docker.io/library/hello-world:latest", `linux/${archType}`],
    );
    const tar = readFileSync(join(folder, "hello-world.tar"));
    assert.ok(
      tar.length === sizeBytes && readTar(tar).some((entry) => entry.name === "manifest.json"),
    );
    rmSync(join(folder, "hello-world.tar"));
  }
});

const TYPED = `import {
  ImgpullError, Puller, listTar, newPullerOpts, openTar, parseImageList, parseReference, pullImages, verifyTar,
  type ErrorCode, type ManifestHolder, type Progress, type PullOptions, type PullReport, type PullResult,
  type PullerOpts,
} from "imgpull";

const presets = {
  arm: { platforms: ["linux/arm64", "linux/arm/v7"], renames: { "docker.io": "registry.corp/hub" } },
  every: { platforms: "all", reuse: ["old.tar"], since: "base.tar", referrers: true, signedBy: ["key.pub"] },
  none: { username: undefined, signal: undefined, onProgress: undefined, dryRun: true, environment: {} },
} satisfies Record<string, PullOptions>;

export async function look(bytes: AsyncIterable<Uint8Array>): Promise<string[]> {
  const images = await listTar("a.tar");
  const report = await verifyTar(bytes, { onProgress: ({ doneBytes, totalBytes }) => console.log(doneBytes, totalBytes) });
  const wrong = report.problems.map((problem) => problem.kind === "size" ? problem.expectedBytes : problem.kind);
  const reader = await openTar("layout/");
  for await (const { name, digest, content } of reader.files()) {
    if (digest === undefined) continue;
    for await (const piece of content()) console.log(name, piece.length);
  }
  await reader.close();
  return [...images.map(({ name }) => name), ...wrong.map(String), ...parseImageList("alpine").references];
}

export async function several(preset: keyof typeof presets): Promise<string[]> {
  const report: PullReport = await pullImages(["alpine", "busybox"], "a.tar", presets[preset]);
  await pullImages(["alpine"], undefined, { dryRun: true, onProgress: ({ moving }) => console.log(moving[0]?.digest) });
  const { host, tag } = parseReference("alpine");
  return [...report.images.map(({ pinned, name, layers }) => pinned + name + layers), host, tag ?? ""];
}

export async function first(): Promise<PullResult> {
  const puller = new Puller("docker.io/hello-world:latest");
  return await puller.pullTar("./hello-world.tar");
}

export async function all(signal: AbortSignal): Promise<number> {
  const opts: PullerOpts = {
    ...newPullerOpts("docker.io/hello-world:latest"), url: "docker.io/hello-world:latest", scheme: "https",
    osType: "linux", archType: "amd64", variant: "v1", username: "me", password: "x", tlsCert: "c", tlsKey: "k",
    caCert: "/path/to/ca.pem", insecure: false, namespace: "docker.io", concurrency: 8, retries: 5, timeoutMs: 30000,
    signal, onProgress: ({ phase, doneBytes, totalBytes, blobsDone, blobsTotal }: Progress) => {
      const known: "resolve" | "fetch" | "finish" = phase;
      console.log(known, doneBytes + totalBytes + blobsDone + blobsTotal);
    },
  };
  const token: PullerOpts = { url: "a.b/c", token: "x" };
  const puller = new Puller(opts);
  try {
    const holder: ManifestHolder = await puller.pullManifest("image");
    const { mediaType, digest, bytes, manifest, imageUrl } = holder;
    const whole: Uint8Array = bytes;
    await puller.pullBlobs(holder, "./blobs");
    const head: { mediaType: string; digest: string; size: number } = await puller.headManifest();
    const got: ManifestHolder = await puller.getManifest();
    const url: string = puller.getUrl() + puller.getOpts().url + token.url + got.digest + mediaType + digest + imageUrl;
    const { name, platform, layers, sizeBytes, fetchedBytes } = await puller.pullTar("./a.tar");
    return head.size + whole.length + url.length + String(manifest).length + name.length + platform.length + layers
      + sizeBytes + fetchedBytes;
  } catch (error) {
    if (!(error instanceof ImgpullError)) throw error;
    const code: ErrorCode = error.code;
    const status: number | undefined = error.status;
    return code === "NOT_FOUND" ? (status ?? 0) : error.cause === undefined ? 1 : 2;
  }
}

// @ts-expect-error: a reference is required
new Puller({ scheme: "https" });
// @ts-expect-error: only these two schemes
export const badScheme: PullerOpts = { url: "a", scheme: "ftp" };
// @ts-expect-error: only these two kinds
export const badKind = async (): Promise<ManifestHolder> => await new Puller("a").pullManifest("both");
// @ts-expect-error: not one of the codes
export const badCode: ErrorCode = "NO_SUCH_CODE";
// @ts-expect-error: a list, or "all"
export const badPlatforms: PullOptions = { platforms: "linux/amd64" };
// @ts-expect-error: url is for Puller
export const badUrl: PullOptions = { url: "a" };
// @ts-expect-error: no such option
export const badOption: PullerOpts = { url: "a", noSuchOption: 1 };
`;

/** Streams of Node's, which need its types. */
const STREAMS = `import { createWriteStream } from "node:fs";
import { spawn } from "node:child_process";
import { PassThrough } from "node:stream";
import { Puller, pullImages } from "imgpull";

export async function everywhere(): Promise<void> {
  const loader = spawn("docker", ["load"], { stdio: ["pipe", "inherit", "inherit"] });
  for (const output of [createWriteStream("a.tar"), loader.stdin, new PassThrough(), process.stdout])
    await pullImages(["alpine"], output);
  await new Puller("alpine").pullTar(process.stdout);
}
`;

/** What a CommonJS file sees as the whole module is what it has at run time. */
const DEFAULT_IMPORT = `import imgpull from "imgpull";
import whole = require("imgpull");

export const kinds: string[] = [typeof imgpull.Puller, typeof whole.pullImages];
console.log(kinds.join());
`;

const STRICT = {
  strict: true,
  exactOptionalPropertyTypes: true,
  noUncheckedIndexedAccess: true,
  skipLibCheck: false,
  noEmit: true,
  target: "es2022",
};
const COMPILERS: Record<string, { options: object; files: string[] }> = {
  "node16 with @types/node": {
    options: { module: "node16", moduleResolution: "node16", lib: ["es2022"], types: ["node"] },
    files: ["typed.mts", "typed.cts", "typed.ts", "first.mts", "streams.ts", "default.cts"],
  },
  "nodenext with @types/node": {
    options: { module: "nodenext", moduleResolution: "nodenext", lib: ["es2022"], types: ["node"] },
    files: ["typed.mts", "typed.cts", "typed.ts", "streams.ts", "streams.mts", "default.cts"],
  },
  "node16, without exactOptionalPropertyTypes": {
    options: {
      module: "node16",
      moduleResolution: "node16",
      lib: ["es2022"],
      types: ["node"],
      exactOptionalPropertyTypes: false,
    },
    files: ["typed.mts", "typed.cts", "streams.ts"],
  },
  "bundler with @types/node": {
    options: { module: "esnext", moduleResolution: "bundler", lib: ["es2022"], types: ["node"] },
    files: ["typed.ts", "first.mts", "streams.ts"],
  },
  "bundler for a browser's types": {
    options: { module: "preserve", moduleResolution: "bundler", lib: ["es2022", "dom"], types: [] },
    files: ["typed.ts"],
  },
};

test("what require() and a compiled default import give is what the types say", async (t) => {
  const compiled = `"use strict";
const load = (module) => (module && module.__esModule ? module : { default: module });
console.log([typeof load(require("imgpull")).default.Puller, typeof require("imgpull").pullImages].join());
`;
  const folder = await makeConsumer(t, { "default.cjs": compiled });
  const { stdout, stderr } = await run(node, ["default.cjs"], { cwd: folder });
  assert.deepEqual([String(stdout), stderr], ["function,function\n", ""]);
});

test("the module exports what the types declare, for import and for require()", async (t) => {
  const list = "console.log(Object.keys(module).sort().join())";
  const folder = await makeConsumer(t, {
    "list.mjs": `import * as module from "imgpull";\n${list}`,
    "list.cjs": `const it = require("imgpull");\n${list.replace("module", "it")}`,
  });
  const values =
    "ImgpullError,Puller,listTar,newPullerOpts,openTar,parseImageList,parseReference,pullImages,verifyTar\n";
  for (const file of ["list.mjs", "list.cjs"])
    assert.equal(String((await run(node, [file], { cwd: folder })).stdout), values);
});

for (const [name, { options, files }] of Object.entries(COMPILERS)) {
  test(`the types compile under strict: ${name}`, async (t) => {
    const folder = await makeConsumer(t, {
      "typed.ts": TYPED,
      "typed.mts": TYPED,
      "typed.cts": TYPED,
      "streams.ts": STREAMS,
      "streams.mts": STREAMS,
      "default.cts": DEFAULT_IMPORT,
      "first.mts": `${ESM}export {};\n`,
      "tsconfig.json": JSON.stringify({ compilerOptions: { ...STRICT, ...options }, files }),
    });
    mkdirSync(join(folder, "node_modules/@types"));
    for (const types of ["@types/node", "undici-types"]) {
      symlinkSync(resolve("node_modules", types), join(folder, "node_modules", types));
    }
    await run(node, [resolve("node_modules/typescript/bin/tsc"), "-p", "."], { cwd: folder });
  });
}

const PUBLIC = [
  "BlobProgress",
  "Descriptor",
  "ErrorCode",
  "ImageList",
  "ImgpullError",
  "LoaderFault",
  "LookOptions",
  "ManifestHolder",
  "OutputStream",
  "Platform",
  "Progress",
  "PullOptions",
  "PullReport",
  "PullResult",
  "PulledImage",
  "Puller",
  "PullerOpts",
  "Reference",
  "TarFile",
  "TarImage",
  "TarLayer",
  "TarLoader",
  "TarProblem",
  "TarReader",
  "TarReport",
  "TarSource",
  "VerifyOptions",
  "listTar",
  "newPullerOpts",
  "openTar",
  "parseImageList",
  "parseReference",
  "pullImages",
  "verifyTar",
];

test("the types have every public name and no internal one", () => {
  const types = readFileSync("dist/imgpull.d.ts", "utf8");
  const kinds =
    /^(?:export )?(?:declare )?(?:interface|type|class|function|const|let|var|enum|namespace) (\w+)/gm;
  const declared = [...types.matchAll(kinds)].map(([, name]) => name);
  assert.deepEqual(declared.sort(), PUBLIC);
  const exported = [...types.matchAll(/^export (?:type )?\{([^}]*)\}/gm)].flatMap(
    ([, names = ""]) =>
      names
        .split(",")
        .map((name) => name.trim())
        .filter(Boolean),
  );
  if (exported.length > 0) assert.deepEqual(exported.sort(), PUBLIC);
  assert.doesNotMatch(types, /@internal|internals|retryAfterMs|[:<|&] ?any\b|import\(/);
});

// ====== What importing and pulling leave behind ======

/** Prints what differs from before to after: names, listeners, handles, environment, agents. */
const PROBE = `
const state = () => ({
  globals: Object.getOwnPropertyNames(globalThis).sort(),
  listeners: process.eventNames().map((name) => [String(name), process.listenerCount(name)]),
  handles: process.getActiveResourcesInfo().filter((name) => !/Promise|Immediate|FSReq|Close/.test(name)),
  environment: JSON.stringify(process.env), exitCode: process.exitCode, title: process.title,
  agents: [http.globalAgent, https.globalAgent].map((agent) => [agent.maxSockets, Object.keys(agent.sockets).length]),
});
// Node itself looks at these when a socket closes, and opens them by that.
for (const name of ["stdin", "stdout", "stderr"]) void process[name];
const before = state();
const compare = (during) => {
  for (const [key, value] of Object.entries(state())) {
    if (JSON.stringify(value) !== JSON.stringify(before[key])) console.log(during, key, before[key], value);
  }
};
process.exit = () => { throw new Error("process.exit was called"); };
`;

test("importing has no side effect, and pulling leaves nothing behind", async (t) => {
  const registry = await serve(t);
  const opts = JSON.stringify(optsFor(registry));
  const pulling = `
  compare("imported");
  const puller = new Puller({ ...${opts}, onProgress: ({ phase }) => {
    if (process.listenerCount("SIGINT") + process.listenerCount("SIGTERM") > 0) console.log(phase, "a signal handler");
    if (http.globalAgent.requests.length > 0) console.log(phase, "the global agent");
  } });
  await puller.pullTar("a.tar");
  await new Promise((done) => setImmediate(done));
  compare("pulled");
  console.log("end");`;
  const folder = await makeConsumer(t, {
    "esm.mjs": `import http from "node:http";\nimport https from "node:https";\n${PROBE}
      const { Puller } = await import("imgpull");\n${pulling}`,
    "commonjs.cjs": `const http = require("node:http");\nconst https = require("node:https");\n${PROBE}
      const { Puller } = require("imgpull");\n(async () => {${pulling}})();`,
  });
  for (const file of ["esm.mjs", "commonjs.cjs"]) {
    const { stdout, stderr } = await run(node, [file], { cwd: folder });
    assert.deepEqual([String(stdout), stderr], ["end\n", ""], file);
    assert.ok(readdirSync(folder).includes("a.tar"));
    rmSync(join(folder, "a.tar"));
  }
});

function optsFor(registry: Registry, opts: Partial<PullerOpts> = {}): PullerOpts {
  const url = `${registry.host}/team/app:1.0`;
  return { url, scheme: "http", osType: "linux", archType: "amd64", retries: 0, ...opts };
}

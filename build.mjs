// node build.mjs            dist/: the command, the library and its types, byte-identical on every rebuild
// node build.mjs --test     bundle test/*.test.ts into build/ and run them (further words go to node --test)
// node build.mjs --run FILE bundle one TypeScript file into build/ and run it (demo, bench)
// node build.mjs --sea [TARGET…] [--node PATH]
//                           dist/bin/: the command and a Node in one executable for each target, a .tar.gz of each,
//                           SHA256SUMS. No TARGET: linux-x64, linux-arm64, win-x64, darwin-x64; for darwin-arm64 give
//                           its Node executable with --node
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gunzipSync, gzipSync } from "node:zlib";
import * as esbuild from "esbuild";

process.chdir(fileURLToPath(new URL(".", import.meta.url)));

/** Version and build date are the top entry of CHANGELOG.md, never the clock: a rebuild gives the same bytes. */
function release() {
  const top = /^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\dT[\d:.]+Z)\)$/m.exec(
    readFileSync("CHANGELOG.md", "utf8"),
  );
  if (!top) throw new Error("CHANGELOG.md: no entry of the form '## 1.2.3 (2026-01-31T00:00:00Z)'");
  return { version: top[1], buildDate: top[2] };
}

const { version, buildDate } = release();
const common = {
  bundle: true,
  platform: "node",
  target: "node20.19",
  charset: "utf8",
  logLevel: "warning",
  define: {
    IMGPULL_VERSION: JSON.stringify(version),
    IMGPULL_BUILD_DATE: JSON.stringify(buildDate),
  },
};

const commandEntry = `import { main } from "./imgpull.ts";
main(process.argv.slice(2)).then((exitCode) => { process.exitCode = exitCode; });
`;

function run(command, args, shell = false) {
  const { status, signal, error } = spawnSync(command, args, { stdio: "inherit", shell });
  if (error) throw error;
  if (status !== 0) process.exit(status ?? (signal ? 1 : 0));
}

async function buildDist() {
  await esbuild.build({
    ...common,
    stdin: { contents: commandEntry, resolveDir: ".", sourcefile: "command.ts", loader: "ts" },
    format: "cjs",
    banner: { js: "#!/usr/bin/env node" },
    outfile: "dist/imgpull.cjs",
  });
  chmodSync("dist/imgpull.cjs", 0o755);
  await esbuild.build({
    ...common,
    entryPoints: ["imgpull.ts"],
    format: "esm",
    outfile: "dist/imgpull.mjs",
  });
  run(process.execPath, [
    "node_modules/typescript/bin/tsc",
    "--noEmit",
    "false",
    "--declaration",
    "--emitDeclarationOnly",
    "--rootDir",
    ".",
    "--outDir",
    "build/types",
  ]);
  // What is @internal is declared no more, so it is not exported either.
  const types = readFileSync("build/types/imgpull.d.ts", "utf8");
  const kinds = "class|function|const|interface|type";
  const isDeclared = (name) => new RegExp(`^(declare )?(${kinds}) ${name}\\b`, "m").test(types);
  writeFileSync(
    "dist/imgpull.d.ts",
    types.replace(
      /^export \{ (.*) \};$/m,
      (_line, names) => `export { ${names.split(", ").filter(isDeclared).join(", ")} };`,
    ),
  );
}

/** Each test file becomes one bundle under build/, with source maps, so that it runs on every supported Node. */
async function bundle(entryPoints) {
  await esbuild.build({
    ...common,
    entryPoints,
    outdir: "build/test",
    format: "esm",
    sourcemap: "inline",
    outExtension: { ".js": ".mjs" },
    external: ["esbuild", "typescript"],
  });
  return entryPoints.map((file) => join("build/test", basename(file).replace(/\.ts$/, ".mjs")));
}

/** Runs test files side by side; false where one failed. */
function runTests(files, flags, environment = {}) {
  if (files.length === 0) return true;
  const { status, error } = spawnSync(
    process.execPath,
    ["--enable-source-maps", "--test", ...flags, ...files],
    {
      stdio: "inherit",
      env: { ...process.env, ...environment },
    },
  );
  if (error) throw error;
  return status === 0;
}

// ====== Binaries ======

/** The Node in the binaries, and what builds them: npm packages of one executable each, pinned by their SHA-512. */
const SEA_NODE = "26.10.0";
const NODE_PACKAGES = {
  "linux-x64":
    "OmAztarr1gK4PD+sNyoku4N5Q40d8eqMuLjNa/zRvxF33aCsVKVIQLs4V5HYPWSWWlMiTdkmbZE/6Phigma0hw==",
  "linux-arm64":
    "idArV/cmqW9M9ODyGlbOIiyxFourDh1mJB0SdKCdMbSZjjef9CLEN3o1/eE4yf+B0+5BD+F74MpTTHiB3XXTBQ==",
  "win-x64":
    "GCIKoDIOUTgULKxFNlfumjEmEgIpBB/7csJ11w6WbFcC/dyZ9UH2YAFr1fuNsdEmPZOAVpT2Cv9QKPwluhOCIQ==",
  "darwin-x64":
    "tR3FX20zCnXJeYvVCZ+ROiA9bHyFVHpges6RoPqtWMTQ4oY2KBcCXlTmcxFZ8w8uApF0IEXIduRPDmAFyxtZ2w==",
};
const isWindows = process.platform === "win32";
const hashOf = (algorithm, file, encoding) =>
  createHash(algorithm).update(readFileSync(file)).digest(encoding);

/** A file of a target's Node package: fetched once, compared with the pinned hash before each use. */
function fetchFromPackage(target, wanted) {
  const pinned = NODE_PACKAGES[target];
  if (!pinned)
    throw new Error(
      `${target}: no Node ${SEA_NODE} is known for it; give its executable with --node PATH`,
    );
  const file = `build/node/node-${target}-${SEA_NODE}.tgz`;
  const isRight = () => existsSync(file) && hashOf("sha512", file, "base64") === pinned;
  if (!isRight()) {
    mkdirSync("build/node", { recursive: true });
    run(
      "npm",
      [
        "pack",
        `node-${target}@${SEA_NODE}`,
        "--pack-destination",
        "build/node",
        "--prefer-offline",
        "--loglevel",
        "error",
      ],
      isWindows,
    );
    if (!isRight())
      throw new Error(`${file} is not the package whose SHA-512 is pinned in build.mjs`);
  }
  const tar = gunzipSync(readFileSync(file));
  for (let at = 0, sizeBytes; at < tar.length; at += 512 + Math.ceil(sizeBytes / 512) * 512) {
    sizeBytes = parseInt(tar.toString("latin1", at + 124, at + 136), 8) || 0;
    const name = tar.toString("latin1", at, tar.indexOf(0, at));
    if (wanted.test(name)) return tar.subarray(at + 512, at + 512 + sizeBytes);
  }
  throw new Error(`${file} holds no ${wanted}`);
}
const fetchNode = (target) => fetchFromPackage(target, /^package\/bin\/node(\.exe)?$/);

/**
 * Takes out what does not run: symbols (a quarter of the file) and a signature that the blob would break. Not by the
 * machine's strip, whose bytes depend on its version; and not after the blob went in, which makes it crash.
 */
function stripExecutable(node) {
  const add = (offset, difference) =>
    node.writeUInt32LE(node.readUInt32LE(offset) + difference, offset);
  if (node.readUInt32BE(0) === 0x7f454c46) {
    // ELF: the loader needs the segments, and all else comes after them
    const segments = Array.from(
      { length: node.readUInt16LE(56) },
      (_, index) => Number(node.readBigUInt64LE(32)) + index * node.readUInt16LE(54),
    );
    node.fill(0, 40, 48).fill(0, 58, 64);
    return node.subarray(
      0,
      Math.max(
        ...segments.map((at) =>
          Number(node.readBigUInt64LE(at + 8) + node.readBigUInt64LE(at + 32)),
        ),
      ),
    );
  }
  if (node.readUInt32LE(0) === 0xfeedfacf) {
    // Mach-O: local symbols come first in the table, so it starts after them
    const commands = new Map();
    for (
      let at = 32, index = node.readUInt32LE(16);
      index > 0;
      index -= 1, at += node.readUInt32LE(at + 4)
    ) {
      commands.set(node.readUInt32LE(at), at);
    }
    const [symbols, ranges] = [commands.get(0x2), commands.get(0xb)]; // LC_SYMTAB, LC_DYSYMTAB
    const locals = node.readUInt32LE(ranges + 12);
    const indirect = node.readUInt32LE(ranges + 56);
    for (let at = indirect; at < indirect + 4 * node.readUInt32LE(ranges + 60); at += 4) {
      if (node.readUInt32LE(at) < 0x40000000) add(at, -locals); // else INDIRECT_SYMBOL_LOCAL or _ABS
    }
    add(symbols + 8, 16 * locals);
    for (const offset of [symbols + 12, ranges + 12, ranges + 16, ranges + 24])
      add(offset, -locals);
  } else {
    // PE: no symbols, and the signature is the end of the file
    const certificates = node.readUInt32LE(0x3c) + 24 + 112 + 4 * 8;
    const start = node.readUInt32LE(certificates);
    node.fill(0, certificates, certificates + 8);
    return start > 0 ? node.subarray(0, start) : node;
  }
  return node;
}

/** A tar that is the same on every machine. */
function tarGz(entries) {
  const octal = (value, digits) => `${value.toString(8).padStart(digits, "0")}\0`;
  const blocks = entries.flatMap(([name, mode, bytes]) => {
    const header = Buffer.alloc(512);
    const fields = [
      [0, name],
      [100, octal(mode, 7)],
      [108, octal(0, 7)],
      [116, octal(0, 7)],
      [124, octal(bytes.length, 11)],
      [136, octal(0, 11)],
      [148, " ".repeat(8)],
      [156, "0"],
      [257, "ustar\x0000"],
    ];
    for (const [offset, text] of fields) header.write(text, offset, "latin1");
    header.write(
      `${octal(
        header.reduce((sum, byte) => sum + byte, 0),
        6,
      )} `,
      148,
      "latin1",
    );
    return [header, bytes, Buffer.alloc((512 - (bytes.length % 512)) % 512)];
  });
  const compressed = gzipSync(Buffer.concat([...blocks, Buffer.alloc(1024)]));
  compressed[9] = 255; // else the kind of system that compressed it
  return compressed;
}

/**
 * No code cache: it gains 1 ms of 60 at start-up, its bytes are random, and Node warns on stderr when it rejects it, as
 * with V8 flags in NODE_OPTIONS. No --use-system-ca: it costs 25 ms, and imgpull reads the system's store itself.
 */
function buildBinary(target, nodePath) {
  const suffix = target.startsWith("win-") ? ".exe" : "";
  const output = `dist/bin/imgpull-${target}${suffix}`;
  const node = nodePath === undefined ? fetchNode(target) : readFileSync(nodePath);
  if (!node.includes(`v${SEA_NODE}`)) throw new Error(`${nodePath} is not Node ${SEA_NODE}`);
  mkdirSync("build/sea", { recursive: true });
  writeFileSync("build/sea/node", stripExecutable(node));
  writeFileSync(
    "build/sea/config.json",
    JSON.stringify({
      main: "dist/imgpull.cjs",
      executable: "build/sea/node",
      output,
      disableExperimentalSEAWarning: true,
      useCodeCache: false,
      useSnapshot: false,
    }),
  );
  run(process.execPath, ["--build-sea", "build/sea/config.json"]);
  chmodSync(output, 0o755);
  const isSigned = target.startsWith("darwin-") && process.platform === "darwin";
  if (isSigned) run("codesign", ["--force", "--identifier", "imgpull", "--sign", "-", output]);
  const binary = readFileSync(output);
  const nodeLicense = fetchFromPackage(Object.keys(NODE_PACKAGES)[0], /^package\/LICENSE$/); // the same for every target
  const licenses = Buffer.concat([
    readFileSync("LICENSE"),
    Buffer.from("\nNode.js, which is in it:\n\n"),
    nodeLicense,
  ]);
  const download = tarGz([
    [`imgpull${suffix}`, 0o755, binary],
    ["imgpull.LICENSES.txt", 0o644, licenses],
  ]);
  writeFileSync(`dist/bin/imgpull-${target}.tar.gz`, download);
  const [size, compressed] = [binary, download].map(
    (bytes) => `${(bytes.length / 1e6).toFixed(1)} MB`,
  );
  const unsigned =
    target.startsWith("darwin-") && !isSigned
      ? "; not signed: on the Mac, codesign --sign - FILE"
      : "";
  console.log(`${output}: ${size}, compressed ${compressed}${unsigned}`);
}

/** Built by the pinned Node itself: --build-sea is its own, and another one's gzip could give other bytes. */
async function buildBinaries(words) {
  if (process.version !== `v${SEA_NODE}`) {
    const builder = `build/node/node${isWindows ? ".exe" : ""}`;
    writeFileSync(builder, fetchNode(`${isWindows ? "win" : process.platform}-${process.arch}`), {
      mode: 0o755,
    });
    return run(builder, ["build.mjs", "--sea", ...words]);
  }
  const at = words.indexOf("--node");
  const nodePath = at < 0 ? undefined : (words.splice(at, 2)[1] ?? "");
  const targets = words.length > 0 || nodePath !== undefined ? words : Object.keys(NODE_PACKAGES);
  if (nodePath !== undefined && targets.length !== 1)
    throw new Error("--node PATH goes with one TARGET");
  await buildDist();
  rmSync("dist/bin", { recursive: true, force: true });
  mkdirSync("dist/bin");
  for (const target of targets) buildBinary(target, nodePath);
  const names = readdirSync("dist/bin").sort();
  const sums = names.map((name) => `${hashOf("sha256", join("dist/bin", name), "hex")}  ${name}\n`);
  writeFileSync("dist/bin/SHA256SUMS", sums.join(""));
}

const [mode, ...rest] = process.argv.slice(2);
if (mode === undefined) {
  await buildDist();
} else if (mode === "--test") {
  const tests = readdirSync("test")
    .filter((name) => name.endsWith(".test.ts"))
    .map((name) => join("test", name));
  const wanted = rest.filter((word) => !word.startsWith("-"));
  const chosen = wanted.length
    ? tests.filter((file) => wanted.some((word) => file.includes(word)))
    : tests;
  const flags = rest.filter((word) => word.startsWith("-"));
  // One file searches all that the others have printed for secrets: it runs when they have ended.
  rmSync("build/test-output", { recursive: true, force: true });
  const isLast = (file) => basename(file).startsWith("secrets.");
  const files = await bundle(chosen);
  const passed = runTests(
    files.filter((file) => !isLast(file)),
    flags,
  );
  const searched = runTests(
    files.filter(isLast),
    flags,
    wanted.length ? {} : { IMGPULL_SUITE: "whole" },
  );
  if (!passed || !searched) process.exit(1);
} else if (mode === "--run") {
  const [file, ...args] = rest;
  run(process.execPath, ["--enable-source-maps", ...(await bundle([file])), ...args]);
} else if (mode === "--sea") {
  await buildBinaries(rest);
} else {
  throw new Error(`build.mjs: unknown option ${mode}`);
}

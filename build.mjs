// node build.mjs            dist/: the command, the library and its types, byte-identical on every rebuild
// node build.mjs --test     bundle test/*.test.ts into build/ and run them (further words go to node --test)
// node build.mjs --run FILE bundle one TypeScript file into build/ and run it (demo, bench)
import { spawnSync } from "node:child_process";
import { chmodSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";

process.chdir(fileURLToPath(new URL(".", import.meta.url)));

/** Version and build date are the top entry of CHANGELOG.md, never the clock: a rebuild gives the same bytes. */
function release() {
  const top = /^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\dT[\d:.]+Z)\)$/m.exec(readFileSync("CHANGELOG.md", "utf8"));
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
  define: { IMGPULL_VERSION: JSON.stringify(version), IMGPULL_BUILD_DATE: JSON.stringify(buildDate) },
};

const commandEntry = `import { main } from "./imgpull.ts";
main(process.argv.slice(2)).then((exitCode) => { process.exitCode = exitCode; });
`;

function run(command, args) {
  const { status, signal, error } = spawnSync(command, args, { stdio: "inherit" });
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
  await esbuild.build({ ...common, entryPoints: ["imgpull.ts"], format: "esm", outfile: "dist/imgpull.mjs" });
  run(process.execPath, ["node_modules/typescript/bin/tsc", "--noEmit", "false", "--declaration",
    "--emitDeclarationOnly", "--rootDir", ".", "--outDir", "build/types"]);
  // What is @internal is declared no more, so it is not exported either.
  const types = readFileSync("build/types/imgpull.d.ts", "utf8");
  const kinds = "class|function|const|interface|type";
  const isDeclared = (name) => new RegExp(`^(declare )?(${kinds}) ${name}\\b`, "m").test(types);
  writeFileSync("dist/imgpull.d.ts", types.replace(/^export \{ (.*) \};$/m, (_line, names) =>
    `export { ${names.split(", ").filter(isDeclared).join(", ")} };`));
}

/** Each test file becomes one bundle under build/, with source maps, so that it runs on every supported Node. */
async function bundle(entryPoints) {
  await esbuild.build({
    ...common, entryPoints, outdir: "build/test", format: "esm", sourcemap: "inline", outExtension: { ".js": ".mjs" },
    external: ["esbuild", "typescript"],
  });
  return entryPoints.map((file) => join("build/test", basename(file).replace(/\.ts$/, ".mjs")));
}

/** Runs test files side by side; false where one failed. */
function runTests(files, flags, environment = {}) {
  if (files.length === 0) return true;
  const { status, error } = spawnSync(process.execPath, ["--enable-source-maps", "--test", ...flags, ...files], {
    stdio: "inherit", env: { ...process.env, ...environment },
  });
  if (error) throw error;
  return status === 0;
}

const [mode, ...rest] = process.argv.slice(2);
if (mode === undefined) {
  await buildDist();
} else if (mode === "--test") {
  const tests = readdirSync("test").filter((name) => name.endsWith(".test.ts")).map((name) => join("test", name));
  const wanted = rest.filter((word) => !word.startsWith("-"));
  const chosen = wanted.length ? tests.filter((file) => wanted.some((word) => file.includes(word))) : tests;
  const flags = rest.filter((word) => word.startsWith("-"));
  // One file searches all that the others have printed for secrets: it runs when they have ended.
  rmSync("build/test-output", { recursive: true, force: true });
  const isLast = (file) => basename(file).startsWith("secrets.");
  const files = await bundle(chosen);
  const passed = runTests(files.filter((file) => !isLast(file)), flags);
  const searched = runTests(files.filter(isLast), flags, wanted.length ? {} : { IMGPULL_SUITE: "whole" });
  if (!passed || !searched) process.exit(1);
} else if (mode === "--run") {
  const [file, ...args] = rest;
  run(process.execPath, ["--enable-source-maps", ...(await bundle([file])), ...args]);
} else {
  throw new Error(`build.mjs: unknown option ${mode}`);
}

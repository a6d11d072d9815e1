// The binaries of `node build.mjs --sea`: what each holds, its download, the sums; and a pull by
// each that runs here. IMGPULL_BINARIES names the targets that must be there ("linux-x64 win-x64"),
// as CI does; without it, those in dist/bin are tested, if they are of this build.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { describe, test } from "node:test";
import { gunzipSync } from "node:zlib";
import { internals } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import {
  COMMAND_PATH,
  type CommandOptions,
  runCommand,
  type TestScope,
  temporaryFolder,
} from "./support/command.ts";
import { makeMultiPlatform, readTar } from "./support/image.ts";
import { startRegistry } from "./support/registry.ts";

const FOLDER = "dist/bin";
const script = readFileSync(COMMAND_PATH);
const { architecture } = internals.wantedPlatform({});

// ====== Executable files ======

interface Executable {
  /** Format and processor. */
  kind: string;
  /** What --build-sea put in: where Node's own loader looks for it. */
  blob: Buffer | undefined;
  /** A signature that says who built it; or, on macOS, none but that of its own bytes. */
  signature: "none" | "ad hoc" | "of somebody";
  /** Symbols that only a debugger needs. */
  symbols: number;
}

/** A range of the file, or an error where it is not all there. */
function part(file: Buffer, start: number, size: number): Buffer {
  if (start + size > file.length)
    throw new Error(`bytes ${start} to ${start + size} of a file of ${file.length}`);
  return file.subarray(start, start + size);
}

function readElf(file: Buffer): Executable {
  const machines: Record<number, string> = { 62: "x64", 183: "arm64" };
  assert.deepEqual(
    [file[4], file[5], file.readUInt16LE(16)],
    [2, 1, 2],
    "64 bits, little-endian, executable",
  );
  let blob: Buffer | undefined;
  for (let index = 0; index < file.readUInt16LE(56); index += 1) {
    const at = Number(file.readBigUInt64LE(32)) + index * file.readUInt16LE(54);
    const segment = part(
      file,
      Number(file.readBigUInt64LE(at + 8)),
      Number(file.readBigUInt64LE(at + 32)),
    );
    for (let note = 0; file.readUInt32LE(at) === 4 && note < segment.length; ) {
      const [nameSize, size] = [segment.readUInt32LE(note), segment.readUInt32LE(note + 4)];
      const content = note + 12 + Math.ceil(nameSize / 4) * 4;
      const name = segment.toString("latin1", note + 12, note + 12 + nameSize);
      if (name === "NODE_SEA_BLOB\0") blob = part(segment, content, size);
      note = content + Math.ceil(size / 4) * 4;
    }
  }
  const symbols = Array.from({ length: file.readUInt16LE(60) }, (_, index) =>
    file.readUInt32LE(Number(file.readBigUInt64LE(40)) + 64 * index + 4),
  ).filter((type) => type === 2).length;
  return { kind: `ELF ${machines[file.readUInt16LE(18)]}`, blob, signature: "none", symbols };
}

function readPe(file: Buffer): Executable {
  const pe = file.readUInt32LE(0x3c);
  assert.equal(file.toString("latin1", pe, pe + 4), "PE\0\0");
  const optional = pe + 24;
  assert.equal(file.readUInt16LE(optional), 0x20b, "PE32+");
  const directory = (index: number) => file.readUInt32LE(optional + 112 + 8 * index);
  const sections = Array.from(
    { length: file.readUInt16LE(pe + 6) },
    (_, index) => optional + file.readUInt16LE(pe + 20) + 40 * index,
  );
  const offsetOf = (address: number): number => {
    const section = sections.find(
      (at) =>
        address >= file.readUInt32LE(at + 12) &&
        address < file.readUInt32LE(at + 12) + file.readUInt32LE(at + 16),
    );
    if (section === undefined) throw new Error(`address ${address} is in no section`);
    return address - file.readUInt32LE(section + 12) + file.readUInt32LE(section + 20);
  };
  const resources = offsetOf(directory(2));
  // Type, name, language: three levels of tables, whose entries are a number or a name, and where
  // to go on.
  const entries = (table: number): [name: number | string, at: number][] => {
    const count = file.readUInt16LE(table + 12) + file.readUInt16LE(table + 14);
    return Array.from({ length: count }, (_, index) => {
      const [key, next] = [
        file.readUInt32LE(table + 16 + 8 * index),
        file.readUInt32LE(table + 20 + 8 * index),
      ];
      const name = resources + (key & 0x7fffffff);
      const text = () => file.toString("utf16le", name + 2, name + 2 + 2 * file.readUInt16LE(name));
      return [key >= 0x80000000 ? text() : key, resources + (next & 0x7fffffff)];
    });
  };
  const below = (table: number | undefined, wanted: number | string) =>
    table === undefined ? undefined : entries(table).find(([name]) => name === wanted)?.[1];
  const languages = below(below(resources, 10), "NODE_SEA_BLOB");
  const leaf = languages === undefined ? undefined : entries(languages)[0]?.[1];
  const blob = leaf && part(file, offsetOf(file.readUInt32LE(leaf)), file.readUInt32LE(leaf + 4));
  const kind = file.readUInt16LE(pe + 4) === 0x8664 ? "PE x64" : "PE";
  return {
    kind,
    blob: blob || undefined,
    signature: directory(4) === 0 ? "none" : "of somebody",
    symbols: file.readUInt32LE(pe + 12),
  };
}

/** What the kernel of macOS looks at before it runs a page: xnu's bsd/sys/cs_blobs.h. */
function assertAdHoc(file: Buffer, signature: Buffer): void {
  const word = (at: number) => signature.readUInt32BE(at);
  assert.deepEqual([word(0), word(4), word(8), word(12)], [0xfade0cc0, signature.length, 1, 0]);
  const directory = signature.subarray(word(16));
  const field = (at: number) => directory.readUInt32BE(at);
  const [hashesAt, identifierAt, pages, codeLimit] = [field(16), field(20), field(28), field(32)];
  assert.deepEqual([field(0), field(4)], [0xfade0c02, directory.length]);
  assert.equal(field(12) & 0x2, 0x2, "ad hoc");
  assert.equal(codeLimit + signature.length, file.length, "all but the signature is signed");
  assert.deepEqual([...directory.subarray(36, 40)], [32, 2, 0, 12], "SHA-256 of 4 KiB");
  assert.match(directory.toString("latin1", identifierAt, hashesAt), /^[\w.-]+\0$/);
  assert.equal(pages, Math.ceil(codeLimit / 4096));
  for (let page = 0; page < pages; page += 1) {
    const bytes = file.subarray(page * 4096, Math.min((page + 1) * 4096, codeLimit));
    const hash = createHash("sha256").update(bytes).digest();
    const at = hashesAt + 32 * page;
    assert.ok(directory.subarray(at, at + 32).equals(hash), `page ${page} is signed as it is`);
  }
}

function readMachO(file: Buffer): Executable {
  const processors: Record<number, string> = { 16777223: "x64", 16777228: "arm64" };
  assert.equal(file.readUInt32LE(12), 2, "an executable");
  const found: Executable = {
    kind: `Mach-O ${processors[file.readUInt32LE(4)]}`,
    blob: undefined,
    signature: "none",
    symbols: 0,
  };
  let symbolCount = 0;
  for (
    let at = 32, index = file.readUInt32LE(16);
    index > 0;
    index -= 1, at += file.readUInt32LE(at + 4)
  ) {
    const command = file.readUInt32LE(at);
    if (command === 0x1d) {
      const [offset, size] = [file.readUInt32LE(at + 8), file.readUInt32LE(at + 12)];
      assert.equal(offset + size, file.length, "the signature is the end of the file");
      assertAdHoc(file, part(file, offset, size));
      found.signature = "ad hoc";
    }
    if (command === 0x2) symbolCount = file.readUInt32LE(at + 12);
    if (command === 0xb) {
      found.symbols = file.readUInt32LE(at + 12);
      assert.equal(
        found.symbols + file.readUInt32LE(at + 20) + file.readUInt32LE(at + 28),
        symbolCount,
      );
      const stubs = part(file, file.readUInt32LE(at + 56), 4 * file.readUInt32LE(at + 60));
      const numbers = Array.from({ length: stubs.length / 4 }, (_, stub) =>
        stubs.readUInt32LE(4 * stub),
      );
      assert.ok(
        numbers.every((number) => number < symbolCount || number >= 0x40000000),
        "a stub without its symbol",
      );
    }
    if (command !== 0x19) continue;
    part(file, Number(file.readBigUInt64LE(at + 40)), Number(file.readBigUInt64LE(at + 48)));
    for (let section = at + 72; section < at + file.readUInt32LE(at + 4); section += 80) {
      const name = file.toString("latin1", section, section + 16);
      if (name !== "__NODE_SEA_BLOB\0") continue;
      found.blob = part(
        file,
        file.readUInt32LE(section + 48),
        Number(file.readBigUInt64LE(section + 40)),
      );
    }
  }
  return found;
}

function readExecutable(file: Buffer): Executable {
  if (file.readUInt32BE(0) === 0x7f454c46) return readElf(file);
  if (file.readUInt32LE(0) === 0xfeedfacf) return readMachO(file);
  if (file.toString("latin1", 0, 2) === "MZ") return readPe(file);
  throw new Error("neither ELF, nor PE, nor Mach-O");
}

// ====== What is here ======

const KINDS: Record<string, string> = {
  "linux-x64": "ELF x64",
  "linux-arm64": "ELF arm64",
  "win-x64": "PE x64",
  "darwin-x64": "Mach-O x64",
  "darwin-arm64": "Mach-O arm64",
};
const fileOf = (target: string) =>
  join(FOLDER, `imgpull-${target}${target.startsWith("win-") ? ".exe" : ""}`);
const hostTarget = `${process.platform === "win32" ? "win" : process.platform}-${process.arch}`;
const required = process.env.IMGPULL_BINARIES?.split(" ").filter(Boolean);

/**
 * Emulates a processor on Debian: the packages qemu-user-static, libstdc++6-arm64-cross and
 * libatomic1-arm64-cross.
 */
const EMULATOR = "/usr/bin/qemu-aarch64-static";
const ARM64_ROOT = "/usr/aarch64-linux-gnu";

/** How a target's binary is run here, if at all. */
function commandFor(target: string): [string, ...string[]] | undefined {
  const binary = resolve(fileOf(target));
  if (target === hostTarget) return [binary];
  if (target !== "linux-arm64" || process.platform !== "linux") return undefined;
  const missing = [EMULATOR, `${ARM64_ROOT}/lib/libatomic.so.1`].filter(
    (file) => !existsSync(file),
  );
  if (missing.length === 0) return [EMULATOR, "-L", ARM64_ROOT, binary];
  if (required?.includes(target))
    throw new Error(`${target} cannot be run without ${missing.join(" and ")}`);
  return undefined;
}

const built = required ?? Object.keys(KINDS).filter((target) => existsSync(fileOf(target)));

function reasonToSkip(): string | false {
  if (required !== undefined) return false;
  const isStale = built.some(
    (target) => !readExecutable(readFileSync(fileOf(target))).blob?.includes(script),
  );
  const isEmpty = built.length === 0 && "dist/bin is empty";
  const reason = isStale ? "dist/bin is of another build" : isEmpty;
  if (reason) console.error(`\n*** BINARIES NOT TESTED, ${reason}: node build.mjs --sea ***\n`);
  return reason;
}

// ====== Tests ======

test("a target that is mistyped is one line, and nothing is built", async () => {
  for (const words of [["linux-x46"], ["linux-x64", "--node"], ["--node", "node", "a", "b"]]) {
    const args = ["build.mjs", "--sea", ...words];
    const { exitCode, stdout, stderr } = await runCommand(args, { command: [process.execPath] });
    assert.deepEqual([exitCode, String(stdout)], [1, ""]);
    assert.match(stderr, /^build\.mjs: [^\n]+\n$/);
  }
});

/**
 * A program for Apple's processors, as Go's linker makes and signs it: no machine of theirs is
 * needed.
 */
async function goProgram(t: TestScope): Promise<Buffer | undefined> {
  const folder = temporaryFolder(t);
  writeFileSync(join(folder, "go.mod"), "module hello\n");
  writeFileSync(join(folder, "main.go"), "package main\n\nfunc main() {}\n");
  const env = { GOOS: "darwin", GOARCH: "arm64", GOCACHE: join(folder, "cache"), GOFLAGS: "" };
  try {
    const command: [string, string] = ["go", "build"];
    await runCommand(["-o", "hello", "."], { command, cwd: folder, env });
    return readFileSync(join(folder, "hello"));
  } catch (error) {
    if (process.env.IMGPULL_INTEROP === "required") throw error;
    return undefined;
  }
}

test("the reader of signatures takes what Go's linker signs, and no other byte", async (t) => {
  const program = await goProgram(t);
  if (program === undefined) return t.skip("missing here: go");
  assert.deepEqual(
    [readMachO(program).kind, readMachO(program).signature],
    ["Mach-O arm64", "ad hoc"],
  );
  for (const at of [5000, program.length - 1]) {
    const changed = Buffer.from(program);
    changed[at] = (changed[at] ?? 0) ^ 1;
    assert.throws(() => readMachO(changed), /is signed as it is/);
  }
});

describe("binaries", { skip: reasonToSkip() }, () => {
  for (const target of built) {
    test(`${target}: the command as it is in dist/, in a Node that starts it`, () => {
      const file = readFileSync(fileOf(target));
      const { kind, blob, signature, symbols } = readExecutable(file);
      assert.equal(kind, KINDS[target]);
      assert.equal(blob?.readUInt32LE(0), 0x143da20, "Node's mark of a single executable");
      assert.ok(blob.includes(script), "the blob holds another command than dist/imgpull.cjs");
      assert.ok(!blob.includes(process.cwd()), "the blob tells where it was built");
      const fuses =
        file.toString("latin1").match(/NODE_SEA_FUSE_fce680ab2cc467b6e072b8b5df1996b2:[01]/g) ?? [];
      assert.deepEqual(
        fuses.map((fuse) => fuse.at(-1)),
        ["1"],
      );
      assert.equal(symbols, 0);
      assert.equal(signature, target.startsWith("darwin-") ? "ad hoc" : "none");
    });

    test(`${target}: the download is the binary, the same wherever it is packed`, () => {
      const compressed = readFileSync(join(FOLDER, `imgpull-${target}.tar.gz`));
      assert.ok(compressed.length < 45e6, `${compressed.length} bytes`);
      assert.deepEqual([...compressed.subarray(0, 10)], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
      const tar = gunzipSync(compressed);
      const [entry, licenses, ...others] = readTar(tar);
      assert.ok(entry && licenses && others.length === 0);
      assert.deepEqual(
        [licenses.name, licenses.mode, licenses.mtime],
        ["imgpull.LICENSES.txt", 0o644, 0],
      );
      const text = tar.toString("utf8", licenses.offset, licenses.offset + licenses.size);
      assert.match(text, /Apache License[\s\S]*Node\.js is licensed for use as follows/);
      const { name, type, mode, uid, gid, mtime, offset, size } = entry;
      const fields = { type: "0", mode: 0o755, uid: 0, gid: 0, mtime: 0 };
      const expected = { name: target.startsWith("win-") ? "imgpull.exe" : "imgpull", ...fields };
      assert.deepEqual({ name, type, mode, uid, gid, mtime }, expected);
      assert.ok(tar.subarray(offset, offset + size).equals(readFileSync(fileOf(target))));
    });
  }

  test("SHA256SUMS lists every file, and only those", () => {
    const names = readdirSync(FOLDER)
      .filter((name) => name !== "SHA256SUMS")
      .sort();
    assert.deepEqual(
      names,
      built
        .flatMap((target) => [fileOf(target), `${FOLDER}/imgpull-${target}.tar.gz`])
        .map((file) => file.slice(FOLDER.length + 1))
        .sort(),
    );
    const sums = names.map(
      (name) =>
        `${createHash("sha256")
          .update(readFileSync(join(FOLDER, name)))
          .digest("hex")}  ${name}\n`,
    );
    assert.equal(readFileSync(join(FOLDER, "SHA256SUMS"), "utf8"), sums.join(""));
  });

  for (const target of built) {
    const command = commandFor(target);
    const skip = !command && "NOT TESTED: another machine's program";
    const architectureThere = target === "linux-arm64" ? "arm64" : architecture;

    test(`${target}: it runs, and pulls`, { skip }, async (t) => {
      if (command === undefined) return;
      const folder = temporaryFolder(t);
      const run = async (args: string[], options: CommandOptions = {}) => {
        const { exitCode, stdout, stderr } = await runCommand(args, {
          command,
          cwd: folder,
          ...options,
        });
        assert.equal(exitCode, 0, stderr);
        return { stdout: String(stdout), stderr };
      };
      const { stdout: version, stderr } = await run(["--version"], { env: { PATH: undefined } });
      assert.equal(stderr, "");
      assert.equal(version, String((await runCommand(["--version"], { nodeArgs: [] })).stdout));
      // V8's flags would make a code cache useless, which Node says on stderr.
      const flags = { NODE_OPTIONS: "--max-old-space-size=512 --stack-trace-limit=5" };
      assert.deepEqual(await run(["--version"], { env: flags }), { stdout: version, stderr: "" });

      // Over TLS, so that the system's roots are read, and without a platform, so that it must know
      // its own.
      const authority = makeAuthority();
      writeFileSync(join(folder, "ca.pem"), authority.cert);
      const registry = await startRegistry({ tls: authority.issueServer(), auth: "bearer" }, t);
      const index = makeMultiPlatform(["linux/amd64", "linux/arm64"], {
        seed: "binary",
        layers: [3_000_000, 4096],
      });
      const reference = registry.add(index, "team/app", "1.0");
      const env = { SSL_CERT_FILE: "ca.pem" };
      const pulled = await run([reference, "binary.tar", "-q"], { env });
      const child = index.children[architectureThere === "arm64" ? 1 : 0];
      assert.deepEqual(pulled, { stdout: `${reference}@${child?.digest}\n`, stderr: "" });
      const platform = ["--platform", `linux/${architectureThere}`];
      await run([reference, "script.tar", ...platform], {
        env,
        command: [process.execPath, COMMAND_PATH],
      });
      const [binaryTar, scriptTar] = ["binary.tar", "script.tar"].map((name) =>
        readFileSync(join(folder, name)),
      );
      assert.ok(binaryTar?.equals(scriptTar ?? Buffer.alloc(0)));

      const refused = await runCommand([reference, "refused.tar", "--retries", "0"], {
        command,
        cwd: folder,
      });
      assert.equal(refused.exitCode, 1);
      assert.match(refused.stderr, /--cacert/);
    });

    test(`${target}: Node's permission model, by NODE_OPTIONS`, { skip }, async (t) => {
      if (command === undefined) return;
      const registry = await startRegistry({}, t);
      const reference = registry.add(makeMultiPlatform(["linux/amd64"]), "team/app", "1.0");
      const [folder, other] = [temporaryFolder(t), temporaryFolder(t)];
      const NODE_OPTIONS = `--permission --allow-net --allow-fs-read=* --allow-fs-write=${folder}`;
      const pullTo = (place: string) =>
        runCommand(
          [
            reference,
            join(place, "a.tar"),
            "--scheme",
            "http",
            "--platform",
            "linux/amd64",
            "--retries",
            "0",
          ],
          { command, env: { NODE_OPTIONS } },
        );
      const allowed = await pullTo(folder);
      assert.equal(allowed.exitCode, 0, allowed.stderr);
      assert.deepEqual(readdirSync(folder), ["a.tar"]);
      const refused = await pullTo(other);
      assert.equal(refused.exitCode, 1, refused.stderr);
      assert.deepEqual(readdirSync(other), []);
    });
  }
});

// The command as Windows runs it: Node for Windows under Wine, whose files behave like Windows' own
// (what is open cannot be replaced), with its paths: drives, \\, C:name, \\\\?\\, spaces.
import assert from "node:assert/strict";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { after, before, describe, type TestContext, test } from "node:test";
import {
  COMMAND_PATH,
  type RunningCommand,
  recordOutput,
  runCommand,
  startCommand,
} from "./support/command.ts";
import { makeMultiPlatform, readTar } from "./support/image.ts";
import { interopFolder, skipWithout } from "./support/interop.ts";
import { nodeExecutable } from "./support/nodes.ts";
import { blobName, blobsOf, checkTar, childOf, filesOf } from "./support/pull.ts";
import { gate, type Registry, type RegistryOptions, startRegistry } from "./support/registry.ts";

/** Wine 8 runs these; Node 24 and later want more of Windows than it has. */
const VERSIONS = ["20.20.2", "22.23.3"];
const WINE_FOLDER = "/usr/lib/wine";
const WINE = join(WINE_FOLDER, "wine64");
const skip =
  process.platform === "linux" && process.arch === "x64"
    ? skipWithout(WINE)
    : "NOT TESTED: another machine's program";

/** Drive Z is the whole machine. */
const SCRIPT = `Z:${COMMAND_PATH.replaceAll("/", "\\")}`;

async function until(what: string, isSo: () => boolean): Promise<void> {
  const since = Date.now();
  while (!isSo()) {
    assert.ok(Date.now() - since < 20_000, `not within 20 s: ${what}`);
    await new Promise((done) => setTimeout(done, 20));
  }
}

const APP = makeMultiPlatform(["linux/amd64"], { seed: "app", layers: [3_000_000, 500_000] });
const NEXT = makeMultiPlatform(["linux/amd64"], { seed: "next", layers: [3_000_000, 70_000] });
const IMAGE = childOf(APP);
const OPTIONS = ["--scheme", "http", "--platform", "linux/amd64", "-q"];

describe("interop with Windows", { skip }, () => {
  const prefix = skip ? "" : interopFolder("wine");
  const driveC = join(prefix, "drive_c");
  // Windows has no HOME.
  const environment = { WINEPREFIX: prefix, WINEDEBUG: "-all", HOME: undefined };

  before(async () => {
    // Node says no to the Windows 7 that Wine is otherwise.
    const version = ["reg", "add", "HKCU\\Software\\Wine", "/v", "Version", "/d", "win10", "/f"];
    const made = await runCommand(version, { command: [WINE], env: environment });
    assert.equal(made.exitCode, 0, made.stderr);
  });
  after(() => runCommand(["-k"], { command: [join(WINE_FOLDER, "wineserver")], env: environment }));

  for (const version of VERSIONS) {
    describe(`Node ${version}`, () => {
      let node = "";
      before(async (t) => {
        const found = await nodeExecutable(version, "win-x64");
        if ("path" in found) node = found.path;
        else (t as TestContext).skip(found.missing);
      });

      interface Place {
        /** A folder of drive C, with a space in its name. */
        folder: string;
        /** The same as Windows names it. */
        windowsFolder: string;
        registry: Registry;
        reference: string;
        start: (args: string[], cwd?: string) => RunningCommand;
        run: (args: string[], stdin?: string) => Promise<Ended>;
        pull: (...args: string[]) => Promise<Ended>;
      }
      interface Ended {
        exitCode: number | null;
        stdout: Buffer;
        stderr: string;
      }

      async function place(t: TestContext, options: RegistryOptions = {}): Promise<Place> {
        const folder = mkdtempSync(join(driveC, "work space-"));
        t.after(() => rmSync(folder, { recursive: true, force: true }));
        const registry = await startRegistry(options, t);
        const reference = registry.add(APP, "team/app", "1.0");
        const talk = mkdtempSync(join(prefix, "talk-"));
        const [out, err, input] = ["out", "err", "in"].map((name) => join(talk, name));
        const env = { ...environment, OUT: out, ERR: err, IN: input };
        // Wine's programs take files for their streams, where other programs' pipes are closed to
        // them.
        const shell = 'exec "$@" >"$OUT" 2>"$ERR" <"$IN"';
        const command: [string, ...string[]] = ["/bin/sh", "-c", shell, "-", WINE, node];
        const start = (args: string[]) =>
          startCommand([SCRIPT, ...args], { command, cwd: folder, env });
        const run = async (args: string[], stdin = ""): Promise<Ended> => {
          writeFileSync(input as string, stdin);
          return ended(start(args));
        };
        const ended = async ({ result }: RunningCommand): Promise<Ended> => {
          const { exitCode } = await result;
          const stderr = readFileSync(err as string, "utf8");
          recordOutput(stderr);
          return { exitCode, stdout: readFileSync(out as string), stderr };
        };
        const pull = (...args: string[]) => run([...OPTIONS, reference, ...args]);
        const windowsFolder = folder.replace(driveC, "C:").replaceAll("/", "\\");
        writeFileSync(input as string, "");
        return { folder, windowsFolder, registry, reference, start, run, pull };
      }

      const succeed = ({ exitCode, stderr }: Ended) =>
        assert.deepEqual([exitCode, stderr], [0, ""]);

      test("a file, the same again, and another version over it", async (t) => {
        const { folder, registry, reference, pull } = await place(t);
        const first = await pull("app.tar");
        succeed(first);
        assert.equal(String(first.stdout), `${reference}@${IMAGE.digest}\n`);
        checkTar(readFileSync(join(folder, "app.tar")), IMAGE);
        succeed(await pull("app.tar"));
        checkTar(readFileSync(join(folder, "app.tar")), IMAGE);
        registry.add(NEXT, "team/app", "1.0");
        succeed(await pull("app.tar"));
        checkTar(readFileSync(join(folder, "app.tar")), childOf(NEXT));
        assert.deepEqual(readdirSync(folder), ["app.tar"]);
      });

      test("--reuse of DEST, and --since", async (t) => {
        const { folder, registry, reference, pull, run } = await place(t);
        succeed(await pull("app.tar"));
        succeed(await pull("--reuse", "app.tar", "app.tar"));
        registry.add(NEXT, "team/app", "2.0");
        const next = reference.replace("1.0", "2.0");
        succeed(await run([...OPTIONS, "--reuse", "app.tar", next, "app.tar"]));
        checkTar(readFileSync(join(folder, "app.tar")), childOf(NEXT));
        const delta = await run([...OPTIONS, "--since", "app.tar", next, "delta.tar"]);
        assert.equal(delta.exitCode, 0, delta.stderr);
        const names = readTar(readFileSync(join(folder, "delta.tar"))).map(({ name }) => name);
        assert.ok(!names.includes(blobName(childOf(NEXT).layers[0]?.digest ?? "")));
        assert.deepEqual(readdirSync(folder).sort(), ["app.tar", "delta.tar"]);
      });

      test("DEST that another program has open: it is said, and the same command goes on", async (t) => {
        const { folder, windowsFolder, registry, pull } = await place(t);
        succeed(await pull("app.tar"));
        registry.add(NEXT, "team/app", "1.0");
        const holder = join(folder, "holder.cjs");
        // As docker.exe holds what it loads: nobody may replace it meanwhile.
        writeFileSync(
          holder,
          `const fs = require("fs"); fs.openSync(${JSON.stringify(`${windowsFolder}\\app.tar`)}, "r");
           fs.writeFileSync("held", ""); setInterval(() => { if (fs.existsSync("let-go")) process.exit(); }, 20);`,
        );
        const holding = startCommand(["holder.cjs"], {
          command: [WINE, node],
          cwd: folder,
          env: environment,
        });
        await until("the file is held", () => existsSync(join(folder, "held")));
        const { exitCode, stderr } = await pull("app.tar");
        assert.equal(exitCode, 1);
        assert.match(stderr, /app\.tar.*another program has it open/);
        assert.match(stderr, /app\.tar\.partial keeps 3\.\d MB/);
        checkTar(readFileSync(join(folder, "app.tar")), IMAGE);
        writeFileSync(join(folder, "let-go"), "");
        await holding.result;
        registry.forget();
        succeed(await pull("app.tar"));
        assert.equal(registry.blobRequests().length, 0, "the partial was kept");
        checkTar(readFileSync(join(folder, "app.tar")), childOf(NEXT));
      });

      test("paths: a drive, its root, C:name, a folder below, \\\\?\\", async (t) => {
        const { folder, windowsFolder, pull } = await place(t);
        mkdirSync(join(folder, "sub"));
        const roots = [`root-${version}.tar`, `verbatim-${version}.tar`] as const;
        t.after(() => {
          for (const root of roots) rmSync(join(driveC, root), { force: true });
        });
        const written: Record<string, string> = {
          [`${windowsFolder}\\drive.tar`]: join(folder, "drive.tar"),
          [`C:\\${roots[0]}`]: join(driveC, roots[0]),
          [`\\\\?\\C:\\${roots[1]}`]: join(driveC, roots[1]),
          "C:relative.tar": join(folder, "relative.tar"),
          "sub\\below.tar": join(folder, "sub/below.tar"),
          "sub/slash.tar": join(folder, "sub/slash.tar"),
          [`\\\\?\\${windowsFolder}\\verbatim.tar`]: join(folder, "verbatim.tar"),
        };
        for (const [dest, file] of Object.entries(written)) {
          const { exitCode, stderr } = await pull(dest);
          assert.deepEqual([exitCode, stderr], [0, ""], dest);
          checkTar(readFileSync(file), IMAGE);
        }
        const missing = await pull(`${windowsFolder}\\no\\such.tar`);
        assert.equal(missing.exitCode, 1);
        assert.match(missing.stderr, /the directory .*no: no such file or directory/);
        const inFile = await pull("sub\\below.tar\\app.tar");
        assert.equal(inFile.exitCode, 1);
        assert.match(
          inFile.stderr,
          /the directory sub\\below\.tar: a part of the path is not a directory/,
        );
      });

      test("a name that is a device is refused, and makes no file", async (t) => {
        const { folder, registry, pull } = await place(t);
        for (const name of ["NUL", "con", "sub\\COM1.tar", "nul."]) {
          const { exitCode, stderr } = await pull(name);
          assert.equal(exitCode, 1, name);
          assert.match(stderr, /is a device of Windows/);
        }
        assert.deepEqual([readdirSync(folder), registry.requests.length], [[], 0]);
      });

      test("a folder is an OCI layout, and is added to", async (t) => {
        const { folder, registry, reference, pull, run } = await place(t);
        for (const dest of ["layout\\", "layout/", "layout"]) succeed(await pull(dest));
        registry.add(NEXT, "team/app", "2.0");
        succeed(await run([...OPTIONS, reference.replace("1.0", "2.0"), "layout"]));
        const layout = join(folder, "layout");
        const { manifests } = JSON.parse(readFileSync(join(layout, "index.json"), "utf8"));
        assert.equal(manifests.length, 2);
        const digests = [IMAGE, childOf(NEXT)].flatMap((image) => [
          image.digest,
          ...blobsOf(image),
        ]);
        const files = readdirSync(join(layout, "blobs/sha256")).map((hex) => `sha256:${hex}`);
        assert.deepEqual(files.sort(), [...new Set(digests)].sort());
        assert.deepEqual(readdirSync(folder), ["layout"]);
      });

      test("- is the tar on stdout", async (t) => {
        const { folder, pull } = await place(t);
        const streamed = await pull("-");
        succeed(streamed);
        filesOf(streamed.stdout);
        succeed(await pull("app.tar"));
        assert.ok(streamed.stdout.equals(readFileSync(join(folder, "app.tar"))));
      });

      test("--verify and --list-tar, by any path", async (t) => {
        const { windowsFolder, pull, run } = await place(t);
        succeed(await pull("app.tar"));
        for (const tar of ["app.tar", `${windowsFolder}\\app.tar`, "C:app.tar"]) {
          const { exitCode, stdout, stderr } = await run(["--verify", tar]);
          assert.equal(exitCode, 0, stderr);
          assert.match(`${stdout}${stderr}`, /all is right/);
          assert.match(String((await run(["--list-tar", tar])).stdout), /team\/app:1\.0/);
        }
      });

      test("lists: with CR, from a file and from stdin, in UTF-16", async (t) => {
        const { folder, reference, run } = await place(t);
        const list = `# images\r\n${reference}\r\n`;
        writeFileSync(join(folder, "images.txt"), list);
        succeed(await run([...OPTIONS, "--from", "images.txt", "a.tar"]));
        succeed(await run([...OPTIONS, "--from", "-", "b.tar"], list));
        // What `>` of Windows PowerShell writes.
        writeFileSync(
          join(folder, "images.lock"),
          Buffer.from(`\ufeff${reference}\r\n`, "utf16le"),
        );
        succeed(await run([...OPTIONS, "--from", "images.lock", "c.tar"]));
        for (const name of ["a.tar", "b.tar", "c.tar"])
          checkTar(readFileSync(join(folder, name)), IMAGE);
      });

      test("credentials are looked for in the user's own folder", async (t) => {
        const { folder, reference, run } = await place(t, { auth: "basic" });
        const config = join(driveC, "users/root/.docker");
        mkdirSync(config, { recursive: true });
        t.after(() => rmSync(config, { recursive: true, force: true }));
        writeFileSync(join(config, "config.json"), "not JSON");
        const { exitCode, stderr } = await run([...OPTIONS, reference, "app.tar"]);
        assert.deepEqual([exitCode, readdirSync(folder)], [1, []]);
        assert.match(stderr, /C:\\users\\root\\\.docker\\config\.json/i);
      });

      for (const signal of ["SIGINT", "SIGKILL"] as const) {
        const what = signal === "SIGINT" ? "Ctrl-C" : "an end without warning";
        test(`${what}, and the same command goes on`, async (t) => {
          const { folder, registry, reference, start, pull } = await place(t);
          const held = gate();
          const digest = IMAGE.layers[0]?.digest ?? "";
          const pause = registry.on(
            { digest, times: 1 },
            { pause: { after: 2_000_000, until: held.promise } },
          );
          const { child, result } = start([...OPTIONS, reference, "app.tar"]);
          await Promise.race([
            pause.reached,
            result.then(({ exitCode }) => assert.fail(`ended before its time: ${exitCode}`)),
          ]);
          const journal = join(folder, "app.tar.partial.journal");
          const isKept = () =>
            existsSync(journal) && readFileSync(journal, "utf8").includes(digest);
          await until("the journal tells of the layer", isKept);
          child.kill(signal);
          const { exitCode } = await result;
          held.open();
          if (signal === "SIGINT") assert.equal(exitCode, 130);
          await registry.settled();
          registry.forget();
          succeed(await pull("app.tar"));
          await registry.settled();
          assert.ok(registry.bytesServed(digest) < 2_500_000, "it went on from what was there");
          checkTar(readFileSync(join(folder, "app.tar")), IMAGE);
          assert.deepEqual(readdirSync(folder), ["app.tar"]);
        });
      }
    });
  }
});

// DEST is -: the same tar on stdout, in order, with bounded read-ahead; what is no file is not
// written to.
import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { existsSync, lstatSync, readdirSync, readFileSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { internals } from "../imgpull.ts";
import { OPTIONS, succeed } from "./support/bundle.ts";
import { COMMAND, runCommand, startCommand, temporaryFolder } from "./support/command.ts";
import { makeMultiPlatform, readTar, type TestContent } from "./support/image.ts";
import { runMain } from "./support/main.ts";
import { childOf, filesOf, makeSlow } from "./support/pull.ts";
import { type Fault, type Registry, startRegistry } from "./support/registry.ts";

const MIB = 1024 * 1024;

// ====== Streams ======

interface Streamed {
  registry: Registry;
  reference: string;
  folder: string;
  tar: Buffer;
}

async function serveStream(t: TestContext, content: TestContent): Promise<Streamed> {
  const registry = await startRegistry({}, t);
  const folder = temporaryFolder(t);
  const reference = registry.add(content, "team/app", "1.0");
  await succeed([...OPTIONS, reference, "app.tar"], { cwd: folder });
  registry.forget();
  return { registry, reference, folder, tar: readFileSync(join(folder, "app.tar")) };
}

const APP = makeMultiPlatform(["linux/amd64"], {
  seed: "app",
  layers: [300_000, 3_000_000, 20_000],
});

test("DEST - is the same tar on stdout and nothing else, also from a bad line", async (t) => {
  const { registry, reference, tar, folder } = await serveStream(t, APP);
  const { stdout, stderr } = await succeed([...OPTIONS, reference, "-"], { cwd: folder });
  assert.ok(stdout.equals(tar));
  assert.match(stderr, /1 image, /);
  const drops = childOf(APP).layers.map(({ digest, bytes }) =>
    registry.on({ digest, times: 1 }, { dropAfter: Math.floor(bytes.length / 3) }),
  );
  const dropped = await succeed([...OPTIONS, "-q", reference, "-"], { cwd: folder });
  assert.deepEqual(
    drops.map(({ hits }) => hits),
    [1, 1, 1],
  );
  assert.ok(dropped.stdout.equals(tar));
  assert.deepEqual(readdirSync(folder), ["app.tar"]);
});

for (const [name, fault] of Object.entries({
  "in ranges, put in order": {},
  "in ranges, each dropped once": { dropAfter: 500_000 },
  "whole, where ranges are ignored": { ignoreRange: true },
  "whole, where ranges are refused": { status: 400 },
} as Record<string, Fault>)) {
  test(`over a slow line, a stream's large layer comes ${name}`, { timeout: 30_000 }, async (t) => {
    const large = makeMultiPlatform(["linux/amd64"], { seed: "far", layers: [14_000_000, 9000] });
    const { registry, reference, tar } = await serveStream(t, large);
    const digest = childOf(large).layers[0]?.digest ?? "";
    makeSlow(registry, digest);
    registry.on({ digest, ranged: true, ...("dropAfter" in fault && { times: 2 }) }, fault);
    const { stdout } = await succeed([...OPTIONS, reference, "-"]);
    assert.ok(stdout.equals(tar));
    const ranges = registry.blobRequests(digest).map(({ range = "whole" }) => range);
    assert.equal(ranges[0], "whole");
    assert.ok(ranges.length > 1 && ranges.slice(1).every((range) => /^bytes=\d+-\d+$/.test(range)));
  });
}

test("Ctrl-C ends a stream without its trailer", async (t) => {
  const { registry, reference } = await serveStream(t, APP);
  const digest = childOf(APP).layers[1]?.digest ?? "";
  const pause = registry.on(
    { digest, times: 1 },
    { pause: { after: 2_000_000, until: new Promise(() => {}) } },
  );
  const { child: process, result } = startCommand([...OPTIONS, "-q", reference, "-"]);
  await pause.reached;
  process.kill("SIGINT");
  const { exitCode, stdout, stderr } = await result;
  assert.deepEqual([exitCode, stderr], [130, ""]);
  assert.throws(() => readTar(stdout), /the tar ends|trailer/);
});

test("a stream that fails has no trailer, and exits 1", async (t) => {
  for (const fault of [{ corruptAt: 2_000_000 }, { status: 404 }]) {
    const { registry, reference } = await serveStream(t, APP);
    registry.on({ digest: childOf(APP).layers[1]?.digest ?? "" }, fault);
    const { exitCode, stdout, stderr } = await runCommand([...OPTIONS, reference, "-"]);
    assert.equal(exitCode, 1);
    assert.match(stderr, new RegExp(childOf(APP).layers[1]?.digest ?? ""));
    assert.throws(() => readTar(stdout), /the tar ends|trailer/);
  }
});

test("a pipe that is closed ends the command with 1, and a line that says why", async (t) => {
  const { registry, reference } = await serveStream(t, APP);
  const { child: process, result } = startCommand([...OPTIONS, "-q", reference, "-"]);
  process.stdout?.once("data", () => process.stdout?.destroy());
  const { stderr, exitCode } = await result;
  const words = "imgpull: cannot write the stream: who reads it has gone before its end\n";
  assert.deepEqual([exitCode, stderr], [1, words]);
  await registry.settled();
});

for (const stream of ["stdout", "stderr"] as const) {
  test(`a reader of ${stream} that has gone does not spoil a pull into a file`, async (t) => {
    const { reference, tar, folder } = await serveStream(t, APP);
    const { child: process, result } = startCommand([...OPTIONS, reference, "again.tar"], {
      cwd: folder,
    });
    process[stream]?.destroy();
    const { exitCode, stderr, stdout } = await result;
    assert.ok(readFileSync(join(folder, "again.tar")).equals(tar));
    assert.deepEqual(readdirSync(folder).sort(), ["again.tar", "app.tar"]);
    assert.doesNotMatch(stderr, /^\s+at |EPIPE/m);
    if (stream === "stderr")
      assert.deepEqual([exitCode, String(stdout).includes(reference)], [0, true]);
  });
}

test("a slow reader holds the line back: read-ahead and memory are bounded", {
  timeout: 60_000,
}, async (t) => {
  const large = makeMultiPlatform(["linux/amd64"], { seed: "slow", layers: [128_000_000] });
  const registry = await startRegistry({}, t);
  const reference = registry.add(large, "team/app", "1.0");
  const { child: process, result } = startCommand([...OPTIONS, "-q", reference, "-"]);
  let readBytes = 0;
  let aheadBytes = 0;
  let peakMemory = 0;
  const { stdout, pid } = process;
  if (!stdout) return assert.fail("stdout is no pipe");
  const slowDown = async (): Promise<void> => {
    stdout.pause();
    for (let turn = 0; turn < 20; turn += 1) await new Promise(setImmediate);
    stdout.resume();
  };
  stdout.on("data", (chunk: Buffer) => {
    readBytes += chunk.length;
    aheadBytes = Math.max(aheadBytes, registry.bytesServed() - readBytes);
    const status = existsSync(`/proc/${pid}/status`)
      ? readFileSync(`/proc/${pid}/status`, "latin1")
      : "";
    peakMemory = Math.max(peakMemory, Number(/VmHWM:\s+(\d+) kB/.exec(status)?.[1] ?? 0) * 1024);
    void slowDown();
  });
  const { exitCode, stdout: tar } = await result;
  assert.equal(exitCode, 0);
  filesOf(tar);
  assert.ok(aheadBytes > 8 * MIB, `the reader was not slow: ${aheadBytes} bytes ahead`);
  // The window, and what Linux may hold in the sockets of one connection: 32 MiB to read, 4 MiB to
  // send.
  assert.ok(
    aheadBytes < internals.TUNING.streamWindowBytes + 48 * MIB,
    `${aheadBytes} bytes ahead of the reader`,
  );
  assert.ok(peakMemory < 192 * MIB, `${peakMemory} bytes of memory`);
});

const isWindows = process.platform === "win32";

/** What comes out of a pipe, to its end. */
function readPipe(file: string): Promise<Buffer> {
  const reader = spawn("cat", [file], { stdio: ["ignore", "pipe", "inherit"] });
  const chunks: Buffer[] = [];
  reader.stdout.on("data", (chunk: Buffer) => chunks.push(chunk));
  return new Promise((done) => reader.on("close", () => done(Buffer.concat(chunks))));
}

function makeFifo(folder: string): string {
  const fifo = join(folder, "fifo");
  assert.equal(spawnSync("mkfifo", [fifo]).status, 0);
  return fifo;
}

test("a FIFO as DEST gets the tar in order and stays one, whoever comes first", {
  skip: isWindows,
}, async (t) => {
  const { reference, folder, tar } = await serveStream(t, APP);
  const fifo = makeFifo(folder);
  for (const isReaderFirst of [true, false]) {
    const early = isReaderFirst ? readPipe(fifo) : undefined;
    const pulling = runCommand([...OPTIONS, reference, fifo]);
    if (!isReaderFirst) await new Promise((wait) => setTimeout(wait, 400)); // it has nothing to wait on but time
    const received = await (early ?? readPipe(fifo));
    const { exitCode, stdout, stderr } = await pulling;
    assert.equal(exitCode, 0, stderr);
    assert.match(
      String(stdout),
      /@sha256:[0-9a-f]{64}\n$/,
      "stdout is not the tar: the lock line is there",
    );
    assert.ok(received.equals(tar));
  }
  assert.ok(lstatSync(fifo).isFIFO());
  assert.deepEqual(readdirSync(folder).sort(), ["app.tar", "fifo"]);
});

test("process substitution: imgpull IMAGE >(program)", { skip: isWindows }, async (t) => {
  const { reference, folder, tar } = await serveStream(t, APP);
  const words = [...COMMAND, ...OPTIONS, reference].map((word) => `'${word}'`).join(" ");
  const script = `${words} >(cat > received) && wait $!`;
  const result = await runCommand(["-c", script], { command: ["bash"], cwd: folder });
  assert.equal(result.exitCode, 0, result.stderr);
  assert.ok(readFileSync(join(folder, "received")).equals(tar));
});

test("a device as DEST, by a link or not, is written to and stays what it is", {
  skip: isWindows,
}, async (t) => {
  const { reference, folder } = await serveStream(t, APP);
  const link = join(folder, "null");
  symlinkSync("/dev/null", link);
  for (const dest of ["/dev/null", link]) {
    const { exitCode, stderr } = await runCommand([...OPTIONS, reference, dest]);
    assert.equal(exitCode, 0, stderr);
  }
  assert.ok(lstatSync("/dev/null").isCharacterDevice() && lstatSync(link).isSymbolicLink());
  assert.deepEqual(readdirSync(folder).sort(), ["app.tar", "null"]);
});

for (const [name, words] of [
  ["/dev/full", /full: .*disk is full/],
  ["/dev/tty", /tty: .*(no such device|ENXIO)/],
] as const) {
  test(`a device that takes nothing is told: ${name}`, { skip: isWindows }, async (t) => {
    const { reference } = await serveStream(t, APP);
    // Without a terminal of its own, wherever the tests run.
    const command: [string, ...string[]] = ["setsid", "--wait", ...COMMAND];
    const { exitCode, stderr } = await runCommand([...OPTIONS, reference, name], { command });
    assert.equal(exitCode, 1, stderr);
    assert.match(stderr, words);
  });
}

test("a terminal as DEST is a mistake", { skip: isWindows }, async (t) => {
  const { reference, folder } = await serveStream(t, APP);
  const words = [...COMMAND, ...OPTIONS, reference, "/dev/tty"].map((word) => `'${word}'`);
  const args = ["-qec", words.join(" "), "/dev/null"];
  const { exitCode, stdout } = await runCommand(args, { command: ["script"], cwd: folder });
  assert.equal(exitCode, 2, String(stdout));
  assert.match(String(stdout), /not written to a terminal/);
});

test("a FIFO that nobody reads is waited for until Ctrl-C", { skip: isWindows }, async (t) => {
  const { reference, folder, registry } = await serveStream(t, APP);
  const fifo = makeFifo(folder);
  const { child, result } = startCommand([...OPTIONS, reference, fifo]);
  await registry.arrived({ kind: "manifest" });
  await new Promise((wait) => setTimeout(wait, 400));
  child.kill("SIGINT");
  const { exitCode } = await result;
  assert.equal(exitCode, 130);
});

test("a reader of a FIFO that goes away ends the pull with an error", {
  skip: isWindows,
}, async (t) => {
  const { reference, folder } = await serveStream(t, APP);
  const fifo = makeFifo(folder);
  const reader = spawn("head", ["-c", "1000", fifo], { stdio: "ignore" });
  t.after(() => reader.kill());
  const { exitCode } = await runCommand([...OPTIONS, reference, fifo]);
  assert.equal(exitCode, 1);
  assert.ok(lstatSync(fifo).isFIFO());
});

test("/dev/stdout as DEST is stdout: the tar, and no line after it", {
  skip: isWindows,
}, async (t) => {
  const { reference, tar } = await serveStream(t, APP);
  const { exitCode, stdout, stderr } = await runMain([...OPTIONS, reference, "/dev/stdout"]);
  assert.equal(exitCode, 0, stderr);
  assert.ok(stdout.equals(tar));
  assert.ok(!lstatSync("/dev/stdout").isFile(), "replaced");
});

// Two runs at one DEST or folder: one works, the others say so and stop; a lock that is left behind
// holds nobody.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmdirSync,
  rmSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { Puller } from "../imgpull.ts";
import {
  COMMAND,
  type CommandResult,
  type RunningCommand,
  runCommand,
  startCommand,
  temporaryFolder,
} from "./support/command.ts";
import { makeImage, makeMultiPlatform } from "./support/image.ts";
import { interrupt, OPTIONS, succeed } from "./support/interrupt.ts";
import {
  assertRight,
  childOf,
  failure,
  pull,
  type Served,
  serve,
  undisturbedTar,
} from "./support/pull.ts";
import { gate, startRegistry } from "./support/registry.ts";

const APP = makeMultiPlatform(["linux/amd64"], {
  seed: "app",
  layers: [5_000_000, 700_000, 300_000],
});
const LARGE = childOf(APP).layers[0]?.digest ?? "";

test("two runs at one DEST: the second says so and stops, the first ends right", async (t) => {
  const served = await serve(t, APP);
  const held = gate();
  const pause = served.registry.on(
    { digest: LARGE, times: 1 },
    { pause: { after: 100_000, until: held.promise } },
  );
  const first = startCommand([...OPTIONS, served.reference, served.dest]);
  await pause.reached;
  const second = await runCommand([...OPTIONS, served.reference, served.dest]);
  assert.equal(second.exitCode, 1);
  assert.match(second.stderr, new RegExp(`app\\.tar.*another imgpull.*${first.child.pid}`, "s"));
  held.open();
  const { exitCode, stderr } = await first.result;
  assert.equal(exitCode, 0, stderr);
  await assertRight(t, served, APP);
});

test("of many runs at one DEST at once, one ends right and the others stop", async (t) => {
  const served = await serve(t, APP);
  const { pid } = await interrupt(served, 2_000_000, "SIGKILL");
  assert.ok(
    pid > 0 && readdirSync(served.folder).some((name) => name.endsWith(".lock")),
    "a stale lock for all",
  );
  const all = await Promise.all(
    [1, 2, 3, 4].map(() => runCommand([...OPTIONS, served.reference, served.dest])),
  );
  assert.ok(
    all.some(({ exitCode }) => exitCode === 0),
    all.map(({ stderr }) => stderr).join(""),
  );
  for (const { exitCode, stderr } of all)
    if (exitCode !== 0) assert.match(stderr, /another imgpull/);
  await assertRight(t, served, APP);
});

test("a lock left before a reboot is stale, though its process number is in use again", async (t) => {
  const served = await serve(t, APP);
  const { pid } = await interrupt(served, 2_000_000, "SIGKILL");
  const [name = ""] = readdirSync(served.folder).filter((file) => file.endsWith(".lock"));
  const lock = join(served.folder, name);
  const text = readFileSync(lock, "utf8");
  assert.ok(text.includes(String(pid)), text);
  writeFileSync(lock, text.replace(String(pid), String(process.pid)));
  utimesSync(lock, new Date("2020-01-01"), new Date("2020-01-01"));
  await succeed([served.reference, served.dest]);
  await assertRight(t, served, APP);
});

test("a lock is its process's as long as that runs, however long it has slept", async (t) => {
  const image = makeImage({ seed: "sleeper", layers: [300_000] });
  const served = await serve(t, image);
  const held = gate();
  const pause = served.registry.on(
    { kind: "layer", times: 1 },
    { pause: { after: 100_000, until: held.promise } },
  );
  const first = startCommand([...OPTIONS, served.reference, served.dest]);
  await pause.reached;
  const minutesAgo = new Date(Date.now() - 120_000);
  utimesSync(`${served.dest}.partial.lock`, minutesAgo, minutesAgo);
  const second = await runCommand([...OPTIONS, served.reference, served.dest]);
  assert.equal(second.exitCode, 1);
  assert.match(second.stderr, /another imgpull/);
  held.open();
  const { exitCode, stderr } = await first.result;
  assert.equal(exitCode, 0, stderr);
  assert.ok(readFileSync(served.dest).equals(await undisturbedTar(t, image)));
});

const IMAGE = makeImage();

test("a folder's lock is let go although one of its files could not be opened", async (t) => {
  const registry = await startRegistry({}, t);
  const url = registry.add(IMAGE, "team/app", "1.0");
  const puller = new Puller({ url, scheme: "http", osType: "linux", archType: "amd64" });
  const holder = await puller.getManifest();
  const folder = temporaryFolder(t);
  const inTheWay = join(folder, `${IMAGE.config.digest.slice("sha256:".length)}.partial`);
  mkdirSync(inTheWay);
  await assert.rejects(puller.pullBlobs(holder, folder), { code: "DISK" });
  rmdirSync(inTheWay);
  await puller.pullBlobs(holder, folder);
});

test("a second pull into a layout that is being filled says so, and adds to it afterwards", async (t) => {
  const registry = await startRegistry({}, t);
  const held = gate();
  const [first, second] = [makeImage({ seed: "first" }), makeImage({ seed: "second" })];
  const urls = [registry.add(first, "team/first", "1"), registry.add(second, "team/second", "1")];
  const digest = first.layers[0]?.digest as string;
  registry.on({ digest }, { wait: held.promise });
  const folder = `${join(temporaryFolder(t), "layout")}/`;
  const [one, two] = urls.map(
    (url) => new Puller({ url, scheme: "http", osType: "linux", archType: "amd64" }),
  );
  const pulling = one?.pullTar(folder);
  await registry.arrived({ digest });
  await assert.rejects(
    two?.pullTar(folder) as Promise<unknown>,
    { code: "DISK" },
    "it says that another is at it",
  );
  held.open();
  await pulling;
  await two?.pullTar(folder);
  const { manifests } = JSON.parse(readFileSync(join(folder, "index.json"), "utf8")) as {
    manifests: unknown[];
  };
  assert.equal(manifests.length, 2);
});

// ====== Locks that are left behind ======

const SMALL = makeImage({ seed: "small", layers: [30_000] });
const THIS_HOST = hostname();
const ago = (milliseconds: number): Date => new Date(Date.now() - milliseconds);

const LEFT_BEHIND: Record<string, { text: string; touched?: Date }> = {
  "an empty one": { text: "" },
  "half of one": { text: '{"pid":1,"ho' },
  "one that is no object": { text: "[1]" },
  "one of another host that nobody has touched for a minute": {
    text: JSON.stringify({ pid: 1, host: "elsewhere" }),
    touched: ago(61_000),
  },
  "one of another host, from the future": {
    text: JSON.stringify({ pid: 1, host: "elsewhere" }),
    touched: ago(-3_600_000),
  },
  "one of a process of this host that is gone, from the future": {
    text: JSON.stringify({ pid: 4_194_303, host: THIS_HOST }),
    touched: ago(-3_600_000),
  },
  "one whose process number lives again, untouched for a minute": {
    text: JSON.stringify({ pid: process.pid, host: THIS_HOST, since: 1 }),
    touched: ago(61_000),
  },
  "one whose id would be a path": {
    text: JSON.stringify({ pid: 1, host: "elsewhere", id: "../../app.tar" }),
    touched: ago(61_000),
  },
};

for (const [what, { text, touched }] of Object.entries(LEFT_BEHIND)) {
  test(`a lock that is left behind holds nobody: ${what}`, async (t) => {
    const served = await serve(t, SMALL);
    const lock = `${served.dest}.partial.lock`;
    writeFileSync(lock, text);
    if (touched) utimesSync(lock, touched, touched);
    await pull(served.reference, served.dest);
    await assertRight(t, served, SMALL);
  });
}

test("a lock of another host that was just touched holds, and says when it lapses", async (t) => {
  const served = await serve(t, SMALL);
  const lock = `${served.dest}.partial.lock`;
  writeFileSync(lock, JSON.stringify({ pid: 12, host: "elsewhere" }));
  utimesSync(lock, ago(20_000), ago(20_000));
  const { message } = await failure(pull(served.reference, served.dest));
  assert.match(message, /process 12 on elsewhere, seen 2\d s ago.*\n.*lapses in (39|40) s/s);
  assert.ok(existsSync(lock), "it was another's");
});

test("what a lock says is shown without its control characters", async (t) => {
  const served = await serve(t, SMALL);
  const words = { pid: "\u001b[2J1", host: `\u001b]0;${"x".repeat(500)}\u0007` };
  writeFileSync(`${served.dest}.partial.lock`, JSON.stringify(words));
  const { message } = await failure(pull(served.reference, served.dest));
  assert.match(message, /another imgpull/);
  assert.ok(
    [...message].every((character) => character === "\n" || character >= " "),
    message,
  );
  assert.ok(message.length < 400, message);
});

test("a lock is never seen without a word of who has it", async (t) => {
  const served = await serve(t, SMALL);
  const held = gate();
  const pause = served.registry.on({ kind: "layer", times: 1 }, { wait: held.promise });
  const pulling = pull(served.reference, served.dest);
  await served.registry.arrived({ kind: "layer" });
  const { pid, id } = JSON.parse(readFileSync(`${served.dest}.partial.lock`, "utf8"));
  assert.equal(pid, process.pid);
  assert.match(id, /^[0-9a-f]{16}$/);
  held.open();
  await pulling;
  assert.equal(pause.hits, 1);
});

// ====== What happens to a pull that loses its lock or its partial ======

const OTHER = makeMultiPlatform(["linux/amd64"], { seed: "other", layers: [200_000] });

interface Disturbed {
  served: Served;
  /** Lets the pull go on. */
  open: () => void;
  ending: Promise<CommandResult>;
}

/** A pull that has some of the large layer and waits for more. */
async function pauseInPull(t: Parameters<typeof serve>[0]): Promise<Disturbed> {
  const served = await serve(t, APP);
  writeFileSync(served.dest, "precious");
  const held = gate();
  const pause = served.registry.on(
    { digest: LARGE, times: 1 },
    { pause: { after: 3_000_000, until: held.promise } },
  );
  const { result } = startCommand([...OPTIONS, "-j", "1", served.reference, served.dest]);
  await pause.reached;
  return { served, open: held.open, ending: result };
}

const DISTURBANCES: Record<string, { disturb: (partial: string) => void; keeps: boolean }> = {
  "the partial is replaced by a whole tar": {
    disturb: (partial) => {
      writeFileSync(`${partial}.new`, readFileSync(partial));
      renameSync(`${partial}.new`, partial);
    },
    keeps: false,
  },
  "the partial is cut": { disturb: (partial) => truncateSync(partial, 1_000_000), keeps: false },
  "the partial is gone": { disturb: (partial) => rmSync(partial), keeps: false },
  "the partial is a link by now": {
    disturb: (partial) => {
      linkSync(partial, `${partial}.other`);
      rmSync(partial);
      spawnSync("ln", ["-s", `${partial}.other`, partial]);
    },
    keeps: false,
  },
  "the lock is another's": {
    disturb: (partial) => {
      rmSync(`${partial}.lock`);
      writeFileSync(`${partial}.lock`, JSON.stringify({ pid: 1, host: "elsewhere", id: "x" }));
    },
    keeps: true,
  },
  "the lock is gone": { disturb: (partial) => rmSync(`${partial}.lock`), keeps: true },
};

for (const [what, { disturb, keeps }] of Object.entries(DISTURBANCES)) {
  test(`a pull never ends well when, meanwhile, ${what}`, {
    skip: process.platform === "win32",
  }, async (t) => {
    const { served, open, ending } = await pauseInPull(t);
    const partial = `${served.dest}.partial`;
    disturb(partial);
    const lock = existsSync(`${partial}.lock`) ? readFileSync(`${partial}.lock`, "utf8") : "";
    open();
    const { exitCode, stderr } = await ending;
    assert.equal(exitCode, 1, stderr);
    assert.match(stderr, /app\.tar\.partial was replaced or cut, or another imgpull took it over/);
    assert.equal(/goes on from there/.test(stderr), keeps, stderr);
    assert.equal(readFileSync(served.dest, "utf8"), "precious");
    if (lock.includes("elsewhere")) assert.equal(readFileSync(`${partial}.lock`, "utf8"), lock);
  });
}

// ====== Namespaces and sleepers ======

const canUnshare = spawnSync("unshare", ["--pid", "--fork", "true"]).status === 0;
const needsNamespaces = {
  skip: !canUnshare && "NOT TESTED: no namespaces of processes can be made here",
};

/** Starts the command as a container does that has its host's name. */
function startElsewhere(args: string[]): RunningCommand {
  const words = ["--pid", "--fork", "--kill-child", ...COMMAND];
  return startCommand([...words, ...OPTIONS, ...args], { command: ["unshare"] });
}

/** Node itself: the one child of unshare. */
function childOfProcess(pid: number | undefined): number {
  return Number(readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8"));
}

for (const [what, start] of [
  ["outside of it", (args: string[]) => runCommand([...OPTIONS, ...args])],
  ["in another", (args: string[]) => startElsewhere(args).result],
] as const) {
  test(
    `a pull in a namespace of processes holds its lock against one ${what}`,
    needsNamespaces,
    async (t) => {
      const served = await serve(t, APP);
      const held = gate();
      const pause = served.registry.on(
        { digest: LARGE, times: 1 },
        { pause: { after: 100_000, until: held.promise } },
      );
      const first = startElsewhere([served.reference, served.dest]);
      await pause.reached;
      const second = await start([served.reference, served.dest]);
      assert.equal(second.exitCode, 1, second.stderr);
      assert.match(second.stderr, /another imgpull/);
      held.open();
      const { exitCode, stderr } = await first.result;
      assert.equal(exitCode, 0, stderr);
      await assertRight(t, served, APP);
    },
  );
}

for (const [what, next] of [
  ["the same image", APP],
  ["what the tag has become", OTHER],
] as const) {
  test(
    `a sleeper that wakes changes nothing of ${what} that another has pulled meanwhile`,
    needsNamespaces,
    async (t) => {
      const served = await serve(t, APP);
      const held = gate();
      const pause = served.registry.on(
        { digest: LARGE, times: 1 },
        { pause: { after: 3_000_000, until: held.promise }, corruptAt: 2_500_000 },
      );
      const sleeper = startElsewhere(["-j", "1", served.reference, served.dest]);
      await pause.reached;
      process.kill(childOfProcess(sleeper.child.pid), "SIGSTOP");
      const lock = `${served.dest}.partial.lock`;
      utimesSync(lock, ago(90_000), ago(90_000));

      served.registry.add(next, "team/app", "1.0");
      await succeed([served.reference, served.dest]);
      const right = readFileSync(served.dest);
      assert.ok(right.equals(await undisturbedTar(t, next)));

      held.open();
      process.kill(childOfProcess(sleeper.child.pid), "SIGCONT");
      const { exitCode, stderr } = await sleeper.result;
      assert.equal(exitCode, 1, stderr);
      assert.match(stderr, /another imgpull took it over/);
      assert.doesNotMatch(stderr, /goes on from there/);
      assert.ok(readFileSync(served.dest).equals(right), "the sleeper wrote to DEST");
      assert.deepEqual(readdirSync(served.folder), ["app.tar"]);
    },
  );
}

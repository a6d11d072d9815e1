// Two runs at one DEST or folder: one works, the others say so and stop; a lock that is left behind holds nobody.
import assert from "node:assert/strict";
import {
  mkdirSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { Puller } from "../imgpull.ts";
import { runCommand, startCommand, temporaryFolder } from "./support/command.ts";
import { makeImage, makeMultiPlatform } from "./support/image.ts";
import { interrupt, OPTIONS, succeed } from "./support/interrupt.ts";
import { assertRight, childOf, serve, undisturbedTar } from "./support/pull.ts";
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

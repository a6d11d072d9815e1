// A folder that others can write to: links, pipes, folders and other users' files under the names
// that a pull uses beside DEST are neither followed nor waited for, and nothing of them becomes
// DEST.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  chownSync,
  closeSync,
  copyFileSync,
  existsSync,
  fstatSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { COMMAND, runCommand, temporaryFolder } from "./support/command.ts";
import { makeImage } from "./support/image.ts";
import { OPTIONS } from "./support/interrupt.ts";
import { assertRight, failure, pull, type Served, serve } from "./support/pull.ts";

const isWindows = process.platform === "win32";
const IMAGE = makeImage({ seed: "planted", layers: [300_000, 20_000] });
const [LAYER = ""] = IMAGE.layers.map(({ digest }) => digest);
const LAYER_BYTES = IMAGE.layers[0]?.bytes as Buffer;
const HEX = LAYER.slice("sha256:".length);
const VICTIM = "precious to somebody\n";

const BESIDE = [".partial", ".partial.journal", ".partial.lock", ".partial.old"];

type Plant = (file: string, victim: string) => void;

const PLANTS: Record<string, Plant> = {
  "a symbolic link": (file, victim) => symlinkSync(victim, file),
  "a link that leads nowhere": (file, victim) => symlinkSync(`${victim}.new`, file),
  "a hard link": (file, victim) => linkSync(victim, file),
  "a pipe": (file) => assert.equal(spawnSync("mkfifo", [file]).status, 0),
};

interface Trap {
  victim: string;
  assertUnharmed: () => void;
}

function makeTrap(t: TestContext): Trap {
  const folder = temporaryFolder(t);
  const victim = join(folder, "victim");
  writeFileSync(victim, VICTIM, { mode: 0o600 });
  const before = lstatSync(victim);
  return {
    victim,
    assertUnharmed: () => {
      assert.equal(readFileSync(victim, "utf8"), VICTIM);
      assert.equal(lstatSync(victim).mode, before.mode);
      assert.deepEqual(readdirSync(folder), ["victim"]);
    },
  };
}

// ====== Beside a tar ======

for (const [what, plant] of Object.entries(PLANTS)) {
  for (const suffix of BESIDE) {
    test(`${what} at DEST${suffix} is not followed`, { skip: isWindows }, async (t) => {
      const served = await serve(t, IMAGE);
      const { victim, assertUnharmed } = makeTrap(t);
      plant(`${served.dest}${suffix}`, victim);
      await pull(served.reference, served.dest, { signal: AbortSignal.timeout(20_000) });
      assertUnharmed();
      const { nlink } = lstatSync(served.dest);
      assert.equal(nlink, 1);
      await assertRight(t, served, IMAGE);
    });
  }
}

for (const suffix of BESIDE.slice(0, 3)) {
  test(`a folder at DEST${suffix} is named`, async (t) => {
    const served = await serve(t, IMAGE);
    mkdirSync(`${served.dest}${suffix}`);
    const { code, message } = await failure(pull(served.reference, served.dest));
    assert.equal(code, "DISK");
    assert.match(message, new RegExp(`app\\.tar${suffix.replaceAll(".", "\\.")}.*directory`));
    assert.deepEqual(readdirSync(served.folder), [`app.tar${suffix}`]);
  });
}

test("a failing pull leaves nothing in the place of a planted link, nor touches where it leads", {
  skip: isWindows,
}, async (t) => {
  const served = await serve(t, IMAGE);
  const { victim, assertUnharmed } = makeTrap(t);
  for (const suffix of BESIDE) symlinkSync(victim, `${served.dest}${suffix}`);
  served.registry.on({ kind: "layer" }, { status: 404 });
  await failure(pull(served.reference, served.dest));
  assertUnharmed();
  for (const name of readdirSync(served.folder)) {
    const stats = lstatSync(join(served.folder, name));
    const isOld = name.endsWith(".old");
    assert.ok(stats.isFile() || (isOld && stats.isSymbolicLink()), name);
  }
});

// ====== Other users ======

const isRoot = process.getuid?.() === 0;
const [ALICE, MALLORY] = [65_533, 65_534];
const needsRoot = { skip: !isRoot && "NOT TESTED: only root can be several users" };

/** A folder like /tmp, and the command where every user can read it. */
function makeSharedFolder(t: TestContext): { folder: string; command: [string, string] } {
  const folder = temporaryFolder(t);
  const program = join(temporaryFolder(t), "imgpull.cjs");
  chmodSync(folder, 0o1777);
  chmodSync(join(program, ".."), 0o755);
  const [node, script] = COMMAND;
  copyFileSync(script ?? node, program);
  chmodSync(program, 0o755);
  return { folder, command: [script === undefined ? program : node, program] };
}

function runAs(user: number, [node, program]: [string, string], args: string[]) {
  const id = String(user);
  const words = [
    "--reuid",
    id,
    "--regid",
    id,
    "--clear-groups",
    node,
    program,
    ...OPTIONS,
    ...args,
  ];
  return runCommand(words, { command: ["setpriv"], env: { HOME: "/nonexistent" } });
}

async function leavePartialOf(user: number, { registry, reference }: Served, t: TestContext) {
  const { folder, command } = makeSharedFolder(t);
  const dest = join(folder, "app.tar");
  const { remove } = registry.on({ digest: LAYER }, { dropAfter: 100_000 });
  const { exitCode } = await runAs(user, command, ["--retries", "0", "-j", "1", reference, dest]);
  remove();
  assert.equal(exitCode, 1);
  assert.equal(lstatSync(`${dest}.partial`).uid, user);
  return { folder, command, dest };
}

test(
  "what another user left of the same pull does not become root's DEST",
  needsRoot,
  async (t) => {
    const served = await serve(t, IMAGE);
    const { folder, dest } = await leavePartialOf(MALLORY, served, t);
    chmodSync(`${dest}.partial`, 0o666);
    await pull(served.reference, dest);
    const { uid, mode } = lstatSync(dest);
    assert.deepEqual([uid, mode & 0o022], [0, 0]);
    await assertRight(t, { folder, dest }, IMAGE);
  },
);

test("a partial that others could write to is not gone on with", needsRoot, async (t) => {
  const served = await serve(t, IMAGE);
  const { folder, dest } = await leavePartialOf(0, served, t);
  chmodSync(`${dest}.partial`, 0o666);
  const held = openSync(`${dest}.partial`, "r+"); // as another user may have done
  t.after(() => closeSync(held));
  await pull(served.reference, dest);
  assert.notEqual(lstatSync(dest).ino, fstatSync(held).ino);
  await assertRight(t, { folder, dest }, IMAGE);
});

for (const suffix of BESIDE.slice(0, 3)) {
  test(`another user's file at DEST${suffix} in a sticky folder is named`, needsRoot, async (t) => {
    const served = await serve(t, IMAGE);
    const { folder, command } = makeSharedFolder(t);
    const dest = join(folder, "app.tar");
    const planted = `${dest}${suffix}`;
    symlinkSync(join(folder, "nowhere"), planted);
    spawnSync("chown", ["-h", String(MALLORY), planted]);
    const { exitCode, stderr } = await runAs(ALICE, command, [served.reference, dest]);
    assert.equal(exitCode, 1);
    assert.match(
      stderr,
      new RegExp(`${suffix.replaceAll(".", "\\.")}.*(moved aside|replaced).*permission`),
    );
    assert.ok(!existsSync(join(folder, "nowhere")) && !existsSync(dest));
    assert.ok(lstatSync(planted).isSymbolicLink());
  });
}

test("another user's lock that is touched holds; one that is not, lapses", needsRoot, async (t) => {
  const served = await serve(t, IMAGE);
  const { folder, command } = makeSharedFolder(t);
  const dest = join(folder, "app.tar");
  const lock = `${dest}.partial.lock`;
  writeFileSync(lock, JSON.stringify({ pid: 1, host: "elsewhere" }), { mode: 0o600 });
  chownSync(lock, MALLORY, MALLORY);
  const { stderr } = await runAs(ALICE, command, [served.reference, dest]);
  assert.match(stderr, /another imgpull \(another user's/);
  spawnSync("touch", ["-d", "2 minutes ago", lock]);
  chmodSync(folder, 0o777);
  const { exitCode, stderr: words } = await runAs(ALICE, command, [served.reference, dest]);
  assert.equal(exitCode, 0, words);
});

// ====== In a layout ======

const layoutOf = ({ folder }: Served): string => join(folder, "layout");

for (const [what, plant] of Object.entries(PLANTS)) {
  for (const name of [`blobs/sha256/${HEX}.partial`, `blobs/sha256/${HEX}`, "oci-layout"]) {
    test(`${what} at ${name.replace(HEX, "HEX")} is not followed`, {
      skip: isWindows,
    }, async (t) => {
      const served = await serve(t, IMAGE);
      const { victim, assertUnharmed } = makeTrap(t);
      const layout = layoutOf(served);
      mkdirSync(join(layout, "blobs/sha256"), { recursive: true });
      plant(join(layout, name), victim);
      await pull(served.reference, `${layout}/`, { signal: AbortSignal.timeout(20_000) });
      assertUnharmed();
      assert.ok(readFileSync(join(layout, "blobs/sha256", HEX)).equals(LAYER_BYTES));
      const names = readdirSync(layout, { recursive: true }) as string[];
      for (const file of names.filter((file) => file !== "blobs" && file !== "blobs/sha256")) {
        const stats = lstatSync(join(layout, file));
        assert.ok(stats.isFile() && stats.nlink === 1 && !file.includes(".partial"), file);
      }
    });
  }
}

for (const [what, plant] of Object.entries(PLANTS)) {
  test(`${what} at index.json is refused`, { skip: isWindows }, async (t) => {
    const served = await serve(t, IMAGE);
    const { victim, assertUnharmed } = makeTrap(t);
    const layout = layoutOf(served);
    mkdirSync(layout);
    plant(join(layout, "index.json"), victim);
    const { code, message } = await failure(pull(served.reference, `${layout}/`));
    assert.equal(code, "DISK");
    assert.match(message, /index\.json/);
    assertUnharmed();
  });
}

for (const name of ["blobs", "blobs/sha256"]) {
  test(`a folder ${name} that is a link out of the layout is refused`, {
    skip: isWindows,
  }, async (t) => {
    const served = await serve(t, IMAGE);
    const outside = temporaryFolder(t);
    const layout = layoutOf(served);
    mkdirSync(join(layout, name, ".."), { recursive: true });
    symlinkSync(outside, join(layout, name));
    const { code, message } = await failure(pull(served.reference, `${layout}/`));
    assert.equal(code, "DISK");
    assert.match(message, /leads out of/);
    assert.deepEqual(readdirSync(outside), []);
  });

  test(`a folder ${name} that is a link within the layout is used`, {
    skip: isWindows,
  }, async (t) => {
    const served = await serve(t, IMAGE);
    const layout = layoutOf(served);
    mkdirSync(join(layout, "store"), { recursive: true });
    mkdirSync(join(layout, name, ".."), { recursive: true });
    symlinkSync(join(layout, "store"), join(layout, name));
    await pull(served.reference, `${layout}/`);
    assert.ok(existsSync(join(layout, "blobs/sha256", HEX)));
  });
}

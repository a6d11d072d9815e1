// The same command after kill -9, Ctrl-C, damage, a full disk: only the rest is fetched; tars are sources. SPEC §5.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import {
  COMMAND,
  type CommandResult,
  runCommand,
  startCommand,
  temporaryFolder,
} from "./support/command.ts";
import {
  makeImage,
  makeLayer,
  makeMultiPlatform,
  readTar,
  type TestImage,
  writeTar,
} from "./support/image.ts";
import {
  assertRight,
  assertUntouched,
  blobBytes,
  blobName,
  childOf,
  failure,
  NAME,
  pull,
  type Served,
  serve,
  undisturbedTar,
} from "./support/pull.ts";
import { gate, type Registry, untilRead } from "./support/registry.ts";

const OPTIONS = ["--scheme", "http", "--platform", "linux/amd64", "--name", NAME];
const MIB = 1024 * 1024;

async function succeed(args: string[], cwd?: string): Promise<CommandResult> {
  const result = await runCommand([...OPTIONS, ...args], cwd === undefined ? {} : { cwd });
  assert.equal(result.exitCode, 0, result.stderr);
  return result;
}

function layerDigests(image: TestImage): string[] {
  return image.layers.map(({ digest }) => digest);
}

// ====== Moments ======

interface Budget {
  spent: Promise<void>;
  sentBytes: () => number;
  remove: () => void;
}

/** The registry serves so many bytes of blobs, over all connections, and then nothing more. */
function serveOnly(registry: Registry, budgetBytes: number): Budget {
  let sentBytes = 0;
  const spent = gate();
  const { remove } = registry.on(
    { kind: "blob" },
    {
      handler: async (_request, response, next) => {
        const write = response.write.bind(response) as (chunk: Buffer) => boolean;
        response.write = ((chunk: Buffer) => {
          const allowed = chunk.subarray(0, budgetBytes - sentBytes);
          sentBytes += allowed.length;
          const goesOn = allowed.length > 0 && write(allowed);
          if (sentBytes === budgetBytes) spent.open();
          return goesOn && allowed.length === chunk.length;
        }) as typeof response.write;
        await next();
      },
    },
  );
  return { spent: spent.promise, sentBytes: () => sentBytes, remove };
}

/** Runs the command until it has got so many bytes of blobs, and ends it by this signal. */
async function interrupt(
  { registry, reference, dest }: Served,
  atBytes: number,
  signal: NodeJS.Signals,
  args: string[] = [],
): Promise<CommandResult & { sentBytes: number; pid: number }> {
  const budget = serveOnly(registry, atBytes);
  const { child, result } = startCommand([...OPTIONS, ...args, reference, dest]);
  await Promise.race([
    budget.spent,
    result.then(({ stderr }) => assert.fail(`ended before its time: ${stderr}`)),
  ]);
  await untilRead(registry);
  child.kill(signal);
  const ended = await result;
  await registry.settled();
  budget.remove();
  registry.forget();
  return { ...ended, sentBytes: budget.sentBytes(), pid: child.pid ?? 0 };
}

const BIG = makeMultiPlatform(["linux/amd64"], {
  seed: "big",
  layers: [40_000_000, 16_000_000, 8_000_000],
});
const BIG_BYTES = blobBytes(childOf(BIG));

test("kill -9 at ten moments, then the same command: right, for at most 1.1 times the bytes", async (t) => {
  const served = await serve(t, BIG);
  for (let moment = 1; moment <= 10; moment += 1) {
    const atBytes = Math.floor((moment * BIG_BYTES) / 11);
    const { signal, sentBytes } = await interrupt(served, atBytes, "SIGKILL");
    assert.equal(signal, "SIGKILL");
    await succeed([served.reference, served.dest]);
    await served.registry.settled();
    await assertRight(t, served, BIG);
    const servedBytes = sentBytes + served.registry.bytesServed();
    assert.ok(
      servedBytes <= 1.1 * BIG_BYTES,
      `${(servedBytes / BIG_BYTES).toFixed(3)} times, killed at ${moment}/11`,
    );
    served.registry.forget();
    rmSync(served.dest);
  }
});

test("kill -9 with eight connections costs at most a few MiB for each", async (t) => {
  const served = await serve(t, BIG);
  const { sentBytes } = await interrupt(served, Math.floor(BIG_BYTES / 2), "SIGKILL");
  await succeed([served.reference, served.dest]);
  await assertRight(t, served, BIG);
  await served.registry.settled();
  const againBytes = sentBytes + served.registry.bytesServed() - BIG_BYTES;
  assert.ok(againBytes <= 8 * 3 * MIB, `${againBytes} bytes again`);
});

test("killed ten times in a row, it still ends right", async (t) => {
  const served = await serve(t, APP);
  for (let kill = 0; kill < 10; kill += 1)
    await interrupt(served, Math.floor(APP_BYTES / 11), "SIGKILL");
  await succeed([served.reference, served.dest]);
  await assertRight(t, served, APP);
});

const APP = makeMultiPlatform(["linux/amd64"], {
  seed: "app",
  layers: [5_000_000, 700_000, 300_000],
});
const APP_IMAGE = childOf(APP);
const APP_BYTES = blobBytes(APP_IMAGE);
const [LARGE = "", MIDDLE = "", SMALL = ""] = layerDigests(APP_IMAGE);

for (const [signal, exitCode] of [
  ["SIGINT", 130],
  ["SIGTERM", 143],
] as const) {
  test(`${signal} keeps everything that has come, to the byte`, async (t) => {
    const served = await serve(t, APP);
    writeFileSync(served.dest, "precious");
    const ended = await interrupt(served, 3_456_789, signal);
    assert.deepEqual([ended.exitCode, ended.signal, ended.stdout.length], [exitCode, null, 0]);
    assert.match(
      ended.stderr,
      /app\.tar\.partial keeps 3\.5 MB: the same command goes on from there/,
    );
    assert.doesNotMatch(ended.stderr, /^\s+at /m, "a stack trace");
    assert.equal(readFileSync(served.dest, "utf8"), "precious");
    assert.ok(readdirSync(served.folder).every((name) => !name.endsWith(".lock")));
    const { stderr } = await succeed([served.reference, served.dest]);
    await served.registry.settled();
    assert.equal(ended.sentBytes + served.registry.bytesServed(), APP_BYTES);
    assert.match(stderr, /3\.5 MB resumed/);
    await assertRight(t, served, APP);
  });
}

// ====== Damage between two runs ======

function flip(file: string, at: number): void {
  const bytes = readFileSync(file);
  bytes[at] = (bytes[at] ?? 0) ^ 0xff;
  writeFileSync(file, bytes);
}

interface Damage {
  /** What happens to the partial, the journal; `offset` is where a layer lies in the tar. */
  spoil: (partial: string, journal: string, offset: (digest: string) => number) => void;
  /** Bytes that may have to come, at most; what is left undamaged is not fetched again. */
  atMost: number;
}

/** Interrupted with MIDDLE and SMALL whole and so much of LARGE; the config is small enough to forget. */
const HELD_OF_LARGE = 3_000_000;
const REST = 5_000_000 - HELD_OF_LARGE;

const DAMAGES: Record<string, Damage> = {
  nothing: { spoil: () => {}, atMost: REST },
  "a bit in a finished layer": {
    spoil: (partial, _, offset) => flip(partial, offset(MIDDLE) + 350_000),
    atMost: REST + 700_000,
  },
  "a bit in the unfinished layer": {
    spoil: (partial, _, offset) => flip(partial, offset(LARGE) + 1),
    atMost: REST + 5_000_000,
  },
  "a bit in a header": { spoil: (partial) => flip(partial, 3), atMost: REST },
  "a finished layer that the power failure turned to zeros": {
    spoil: (partial, _, offset) => {
      const bytes = readFileSync(partial);
      writeFileSync(partial, bytes.fill(0, offset(SMALL), offset(SMALL) + 300_000));
    },
    atMost: REST + 300_000,
  },
  "the partial cut short": {
    spoil: (partial, _, offset) => truncateSync(partial, offset(LARGE) + 100),
    atMost: APP_BYTES + REST,
  },
  "the partial empty": { spoil: (partial) => truncateSync(partial, 0), atMost: APP_BYTES + REST },
  "the partial gone": { spoil: (partial) => rmSync(partial), atMost: APP_BYTES },
  "the journal gone": { spoil: (_, journal) => rmSync(journal), atMost: APP_BYTES },
  "the journal empty": { spoil: (_, journal) => truncateSync(journal, 0), atMost: APP_BYTES },
  "the journal's last line cut": {
    spoil: (_, journal) => truncateSync(journal, statSync(journal).size - 2),
    atMost: APP_BYTES,
  },
  "zeros at the journal's end": {
    spoil: (_, journal) => writeFileSync(journal, Buffer.alloc(4096), { flag: "a" }),
    atMost: REST,
  },
  "nonsense in the journal": {
    spoil: (_, journal) => {
      const lines = [
        `${LARGE} 5-3;`,
        `${LARGE} 0-999999999999;`,
        `${SMALL} 1-2,0-9;`,
        "sha256:zz 0-1;",
        "",
        "a b;",
      ];
      writeFileSync(journal, `${lines.join("\n")}\n`, { flag: "a" });
    },
    atMost: 2 * APP_BYTES,
  },
};

for (const [name, { spoil, atMost }] of Object.entries(DAMAGES)) {
  test(`damage between two runs is found and repaired: ${name}`, async (t) => {
    const served = await serve(t, APP);
    const held = gate();
    const large = served.registry.on(
      { digest: LARGE },
      { pause: { after: HELD_OF_LARGE, until: held.promise } },
    );
    let stderr = "";
    const finished = gate();
    const { child, result } = startCommand([...OPTIONS, "-j", "4", served.reference, served.dest], {
      onStderr: (text) => {
        stderr += text;
        if (stderr.includes(MIDDLE.slice(0, 19)) && stderr.includes(SMALL.slice(0, 19)))
          finished.open();
      },
    });
    await Promise.all([large.reached, finished.promise]);
    await untilRead(served.registry);
    child.kill("SIGINT");
    await result;
    large.remove();
    await served.registry.settled();
    served.registry.forget();

    const partial = `${served.dest}.partial`;
    const [journal = ""] = readdirSync(served.folder).filter(
      (file) => !["app.tar", "app.tar.partial"].includes(file),
    );
    const offsets = new Map(
      readTar(await undisturbedTar(t, APP)).map((entry) => [entry.name, entry.offset]),
    );
    spoil(partial, join(served.folder, journal), (digest) => offsets.get(blobName(digest)) ?? NaN);
    await succeed([served.reference, served.dest]);
    await assertRight(t, served, APP);
    await served.registry.settled();
    assert.ok(
      served.registry.bytesServed() <= atMost,
      `${served.registry.bytesServed()} bytes instead of ${atMost}`,
    );
  });
}

test("the tag moves between two runs: what both images share is not fetched again", async (t) => {
  const served = await serve(t, APP);
  const { registry } = served;
  await interrupt(served, APP_BYTES - 1, "SIGINT", ["-j", "1"]);
  const layers = [...APP_IMAGE.layers, makeLayer({ seed: "new" })];
  const moved = makeMultiPlatform(["linux/amd64"], { seed: "moved", layers });
  registry.add(moved, "team/app", "1.0");
  await succeed([served.reference, served.dest]);
  const fetched = layerDigests(childOf(moved)).filter(
    (digest) => registry.blobRequests(digest).length > 0,
  );
  assert.ok(
    fetched.length <= 2 && fetched.includes(childOf(moved).layers.at(-1)?.digest ?? ""),
    String(fetched),
  );
  await assertRight(t, served, moved);
});

test("a folder without room for the rest keeps what is there", {
  skip: process.platform !== "linux",
}, async (t) => {
  const served = await serve(t, APP);
  await interrupt(served, 3_000_000, "SIGINT");
  // A limit on the size of files stands for a full disk: it needs no mount.
  const limited = await runCommand(
    ["-c", 'ulimit -f 100; exec "$@"', "-", ...COMMAND, ...OPTIONS, served.reference, served.dest],
    { command: ["/bin/sh"] },
  );
  assert.equal(limited.exitCode, 1, limited.stderr);
  assert.match(limited.stderr, /app\.tar/);
  assert.doesNotMatch(limited.stderr, /^\s+at /m, "a stack trace");
  await served.registry.settled();
  const servedBytes = served.registry.bytesServed();
  await succeed([served.reference, served.dest]);
  await served.registry.settled();
  assert.ok(
    served.registry.bytesServed() - servedBytes <= APP_BYTES - 3_000_000,
    "went on from what was there",
  );
  await assertRight(t, served, APP);
});

// ====== Two runs, and locks ======

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

// ====== Tars at hand ======

const BASE = [
  makeLayer({ seed: "base-1", sizeBytes: 200_000 }),
  makeLayer({ seed: "base-2", sizeBytes: 100_000 }),
];
const V1 = makeMultiPlatform(["linux/amd64"], {
  seed: "v1",
  layers: [...BASE, makeLayer({ seed: "v1-only" })],
});
const V2 = makeMultiPlatform(["linux/amd64"], {
  seed: "v2",
  layers: [...BASE, makeLayer({ seed: "v2-only" })],
});
const OWN_OF_V2 = [childOf(V2).config.digest, childOf(V2).layers[2]?.digest ?? ""].sort();

function fetchedBlobs(registry: Registry): (string | undefined)[] {
  return registry
    .blobRequests()
    .map(({ digest }) => digest)
    .sort();
}

test("an existing DEST is a source: only the new version's own blobs are fetched", async (t) => {
  const served = await serve(t, V1);
  const { registry, reference, dest } = served;
  await succeed([reference, dest]);
  registry.add(V2, "team/app", "1.0");
  registry.forget();
  const { stderr } = await succeed([reference, dest]);
  assert.deepEqual(fetchedBlobs(registry), OWN_OF_V2);
  assert.match(stderr, /300 kB reused/);
  await assertRight(t, served, V2);
  registry.forget();
  const again = await succeed([reference, dest]);
  assert.deepEqual(fetchedBlobs(registry), []);
  assert.match(again.stderr, /0 B fetched|nothing fetched/);
  await assertRight(t, served, V2);
});

test("an existing DEST is not believed: a damaged blob is fetched, the others are copied", async (t) => {
  const served = await serve(t, V1);
  const { registry, reference, dest } = served;
  await succeed([reference, dest]);
  const spoiled = BASE[0]?.digest ?? "";
  const { offset = NaN } =
    readTar(readFileSync(dest)).find(({ name }) => name === blobName(spoiled)) ?? {};
  flip(dest, offset + 100_000);
  registry.forget();
  await succeed([reference, dest]);
  assert.deepEqual(fetchedBlobs(registry), [spoiled]);
  await assertRight(t, served, V1);
});

for (const [name, content] of Object.entries({
  "is empty": Buffer.alloc(0),
  "is no tar": Buffer.from("precious"),
  "is all zeros": Buffer.alloc(10_240),
  "is cut off": writeTar([["blobs/sha256/x", Buffer.alloc(5000)]]).subarray(0, 3000),
})) {
  test(`an existing DEST that ${name} is replaced, once all is right`, async (t) => {
    const served = await serve(t, V1);
    writeFileSync(served.dest, content);
    const gone = served.registry.on({ digest: BASE[0]?.digest ?? "" }, { status: 404 });
    const failed = await runCommand([...OPTIONS, served.reference, served.dest]);
    assert.equal(failed.exitCode, 1);
    assert.ok(readFileSync(served.dest).equals(content));
    gone.remove();
    await succeed([served.reference, served.dest]);
    await assertRight(t, served, V1);
  });
}

/** Archives as other programs lay them out. Only what is named by its own digest can be looked up. */
function foreignArchives(image: TestImage): Record<string, [string, Buffer][]> {
  const hex = (digest: string): string => digest.slice("sha256:".length);
  const { config, configBytes, layers } = image;
  const list = (name: (digest: string) => string, last: string): [string, Buffer][] => [
    ...layers.map(({ digest, bytes }): [string, Buffer] => [name(hex(digest)), bytes]),
    [last, configBytes],
  ];
  return {
    crane: list((digest) => `${digest}.tar.gz`, config.digest),
    "skopeo's docker-archive": list((digest) => `${digest}.tar`, `${hex(config.digest)}.json`),
    "docker save and OCI archives": list(
      (digest) => `blobs/sha256/${digest}`,
      `blobs/sha256/${hex(config.digest)}`,
    ),
    "tar -C layout ./": list(
      (digest) => `./blobs/sha256/${digest}`,
      `./blobs/sha256/${hex(config.digest)}`,
    ),
  };
}

for (const [program, files] of Object.entries(foreignArchives(childOf(V1)))) {
  test(`--reuse takes blobs from an archive of ${program}`, async (t) => {
    const served = await serve(t, V1);
    const other = join(temporaryFolder(t), "other.tar");
    writeFileSync(other, writeTar(files));
    const before = readFileSync(other);
    await succeed(["--reuse", other, served.reference, served.dest]);
    assert.deepEqual(fetchedBlobs(served.registry), []);
    await assertRight(t, served, V1);
    assert.ok(readFileSync(other).equals(before));
  });
}

test("--reuse is repeatable and not believed: each blob from the first tar that really has it", async (t) => {
  const served = await serve(t, V1);
  const folder = temporaryFolder(t);
  type File = [name: string, bytes: Buffer];
  const [first, second] = BASE.map(({ digest, bytes }): File => [blobName(digest), bytes]) as [
    File,
    File,
  ];
  const lying = Buffer.from(first[1]);
  lying[5] = (lying[5] ?? 0) ^ 1;
  writeFileSync(
    join(folder, "a.tar"),
    writeTar([
      [first[0], lying],
      [second[0], second[1].subarray(1)],
    ]),
  );
  writeFileSync(join(folder, "b.tar"), writeTar([first]));
  writeFileSync(join(folder, "c.tar"), writeTar([second]));
  for (const dest of [served.dest, "-"]) {
    served.registry.forget();
    const sources = ["--reuse", "a.tar", "--reuse=b.tar", "--reuse", "c.tar"];
    const { stdout } = await succeed([...sources, served.reference, dest], folder);
    const own = [childOf(V1).config.digest, childOf(V1).layers[2]?.digest].sort();
    assert.deepEqual(fetchedBlobs(served.registry), own, dest);
    if (dest === "-") assert.ok(stdout.equals(await undisturbedTar(t, V1)));
    else await assertRight(t, served, V1);
  }
});

test("--reuse of DEST itself, and a partial that goes before it", async (t) => {
  const served = await serve(t, V1);
  await succeed([served.reference, served.dest]);
  served.registry.add(V2, "team/app", "1.0");
  await interrupt(served, 4000, "SIGKILL", ["--reuse", served.dest]);
  await succeed(["--reuse", served.dest, served.reference, served.dest]);
  assert.deepEqual(
    fetchedBlobs(served.registry).filter((digest) => !OWN_OF_V2.includes(digest ?? "")),
    [],
  );
  await assertRight(t, served, V2);
});

for (const option of ["--reuse", "--since"]) {
  for (const [name, content] of [
    ["no such file", undefined],
    ["no tar", "precious"],
    ["cut off", "cut"],
  ] as const) {
    test(`${option} with ${name} is an error that names it, before a layer moves`, async (t) => {
      const { registry, reference, dest, folder } = await serve(t, V1);
      const tar = join(temporaryFolder(t), "given.tar");
      if (content === "precious") writeFileSync(tar, content);
      if (content === "cut")
        writeFileSync(tar, writeTar([["file", Buffer.alloc(5000)]]).subarray(0, 3000));
      const { exitCode, stderr, stdout } = await runCommand([
        ...OPTIONS,
        option,
        tar,
        reference,
        dest,
      ]);
      assert.deepEqual(
        [exitCode, stdout.length, registry.blobRequests().length],
        [1, 0, 0],
        stderr,
      );
      assert.match(stderr, /given\.tar/);
      assert.deepEqual(readdirSync(folder), []);
    });
  }
}

test("--since leaves out the layers that the tar holds, and says what the delta needs", async (t) => {
  const served = await serve(t, V1);
  const { registry, reference, dest, folder } = served;
  await succeed([reference, dest]);
  renameSync(dest, join(folder, "base.tar"));
  registry.add(V2, "team/app", "2.0");
  registry.forget();
  const delta = join(folder, "delta.tar");
  const { stderr } = await succeed([
    "--since",
    join(folder, "base.tar"),
    reference.replace("1.0", "2.0"),
    delta,
  ]);
  assert.deepEqual(fetchedBlobs(registry), OWN_OF_V2);
  assert.match(stderr, /2 layers.*base\.tar/);
  assert.match(stderr, /containerd store/);
  assert.match(stderr, /--no-unpack/);
  const tar = readFileSync(delta);
  const names = readTar(tar).map(({ name }) => name);
  const held = [childOf(V2).digest, childOf(V2).config.digest, childOf(V2).layers[2]?.digest ?? ""];
  assert.deepEqual(names, ["oci-layout", "index.json", "manifest.json", ...held.map(blobName)]);
  const entry = readTar(tar).find(({ name }) => name === "manifest.json");
  const [described] = JSON.parse(
    tar.toString("utf8", entry?.offset, (entry?.offset ?? 0) + (entry?.size ?? 0)),
  );
  assert.equal(described.Layers.length, 3, "manifest.json names the layers that are left out too");
});

test("--since never leaves out configs or manifests, and the delta of the same image has no layers", async (t) => {
  const served = await serve(t, V1);
  const { reference, dest, folder } = served;
  await succeed([reference, dest]);
  copyFileSync(dest, join(folder, "base.tar"));
  await succeed(["--since", join(folder, "base.tar"), reference, dest]);
  const image = childOf(V1);
  assert.deepEqual(
    readTar(readFileSync(dest)).map(({ name }) => name),
    [
      "oci-layout",
      "index.json",
      "manifest.json",
      ...[image.digest, image.config.digest].map(blobName),
    ],
  );
});

test("a single image, whose config tells its platform, resumes too", async (t) => {
  const single = makeImage({ seed: "one", layers: [700_000, 200_000] });
  const served = await serve(t, single);
  await interrupt(served, 500_000, "SIGKILL");
  await succeed([served.reference, served.dest]);
  await assertRight(t, served, single);
  assert.ok(!existsSync(`${served.dest}.partial`));
});

// ====== Disks ======

/** A file system of its own, or undefined (and the test skipped) where we may not mount one. */
function mountSmallDisk(t: TestContext, options: string): string | undefined {
  const folder = mkdtempSync(join(tmpdir(), "imgpull-disk-"));
  t.after(() => {
    spawnSync("umount", [folder]);
    rmSync(folder, { recursive: true, force: true });
  });
  const { status, stderr, error } = spawnSync("mount", [
    "-t",
    "tmpfs",
    "-o",
    options,
    "tmpfs",
    folder,
  ]);
  if (status === 0) return folder;
  t.skip(
    `NOT TESTED: no tmpfs can be mounted here (${error?.message ?? stderr.toString().trim()})`,
  );
  return undefined;
}

test("a disk known to be too small is refused before a layer moves", async (t) => {
  const folder = mountSmallDisk(t, "size=2m");
  if (folder === undefined) return;
  const { registry, reference } = await serve(t, APP);
  const error = await failure(pull(reference, join(folder, "app.tar")));
  assert.equal(error.code, "DISK");
  assert.match(error.message, /full.*6\.0 MB.*2\.1 MB free/);
  assert.equal(registry.blobRequests().length, 0);
  assert.deepEqual(readdirSync(folder), []);
});

test("a disk that fills in mid-pull is named; with room again the same pull goes on", async (t) => {
  const folder = mountSmallDisk(t, "size=12m");
  if (folder === undefined) return;
  const { registry, reference } = await serve(t, APP);
  const dest = join(folder, "app.tar");
  writeFileSync(dest, "precious");
  const filled = gate();
  const pause = registry.on(
    { digest: LARGE, times: 1 },
    { pause: { after: 3_000_000, until: filled.promise } },
  );
  const pulling = failure(pull(reference, dest, { concurrency: 2 }));
  await pause.reached;
  while (statSync(`${dest}.partial`).blocks * 512 < 2_000_000) await new Promise(setImmediate);
  assert.throws(
    () => writeFileSync(join(folder, "filling"), Buffer.alloc(12 * 1024 * 1024)),
    /ENOSPC/,
  );
  filled.open();
  const error = await pulling;
  assert.equal(error.code, "DISK");
  assert.match(error.message, /app\.tar.*disk is full/);
  rmSync(join(folder, "filling"));
  assertUntouched({ folder, dest });
  await registry.settled();
  registry.forget();
  await pull(reference, dest);
  assert.ok(registry.bytesServed(LARGE) < 5_000_000, "went on from what was there");
  await assertRight(t, { folder, dest }, APP);
});

test("a read-only file system is named before anything is asked", async (t) => {
  const folder = mountSmallDisk(t, "size=2m,ro");
  if (folder === undefined) return;
  const { registry, reference } = await serve(t, APP);
  const error = await failure(pull(reference, join(folder, "app.tar")));
  assert.equal(error.code, "DISK");
  assert.match(error.message, /app\.tar.*read-only/);
  assert.equal(registry.requests.length, 0);
});

const isRoot = process.getuid?.() === 0;

test("a folder one may not write to is named", {
  skip: isRoot && "NOT TESTED: root may write anywhere",
}, async (t) => {
  const { registry, reference, folder, dest } = await serve(t, APP);
  chmodSync(folder, 0o555);
  t.after(() => chmodSync(folder, 0o755));
  const error = await failure(pull(reference, dest));
  assert.deepEqual([error.code, registry.requests.length], ["DISK", 0]);
  assert.match(error.message, /app\.tar.*permission denied/);
});

for (const [name, inside, words] of [
  ["a folder that is not there", "missing/app.tar", /app\.tar: the directory .*missing: no such/],
  ["a folder that is a file", "file/app.tar", /app\.tar.*directory/],
] as const) {
  test(`DEST in ${name} is refused before anything is asked`, async (t) => {
    const { registry, reference, folder } = await serve(t, APP);
    writeFileSync(join(folder, "file"), "precious");
    const error = await failure(pull(reference, join(folder, inside)));
    assert.deepEqual([error.code, registry.requests.length], ["DISK", 0]);
    assert.match(error.message, words);
    assert.deepEqual(readdirSync(folder), ["file"]);
    assert.equal(readFileSync(join(folder, "file"), "utf8"), "precious");
  });
}

test("a symbolic link at DEST stays one, and what it points at is replaced", async (t) => {
  const served = await serve(t, APP);
  mkdirSync(join(served.folder, "store"));
  writeFileSync(join(served.folder, "store/real.tar"), "old");
  symlinkSync("store/real.tar", served.dest);
  await pull(served.reference, served.dest);
  assert.equal(readlinkSync(served.dest), "store/real.tar");
  assert.ok(readFileSync(served.dest).equals(await undisturbedTar(t, APP)));
  assert.deepEqual(readdirSync(join(served.folder, "store")), ["real.tar"]);
});

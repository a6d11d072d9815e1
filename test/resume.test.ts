// The same command after kill -9, Ctrl-C, damage, a full disk: only the rest is fetched; tars are
// sources.
import assert from "node:assert/strict";
import {
  existsSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { COMMAND, runCommand, startCommand } from "./support/command.ts";
import {
  makeImage,
  makeLayer,
  makeMultiPlatform,
  readTar,
  type TestImage,
} from "./support/image.ts";
import { askedBytes, flip, interrupt, OPTIONS, succeed } from "./support/interrupt.ts";
import {
  assertRight,
  blobBytes,
  blobName,
  childOf,
  failure,
  pull,
  serve,
  undisturbedTar,
} from "./support/pull.ts";
import { gate, untilRead } from "./support/registry.ts";

const MIB = 1024 * 1024;

function layerDigests(image: TestImage): string[] {
  return image.layers.map(({ digest }) => digest);
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
    const takenBytes = sentBytes + askedBytes(served.registry, childOf(BIG));
    assert.ok(
      takenBytes <= 1.1 * BIG_BYTES,
      `${(takenBytes / BIG_BYTES).toFixed(3)} times, killed at ${moment}/11`,
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

test("kill -9 over a slow line costs at most two seconds of it", { timeout: 60_000 }, async (t) => {
  // 200 KB/s over two connections: no batch is full before it is a second old.
  const bytesPerMs = 200;
  const served = await serve(t, APP);
  const { registry } = served;
  let sentBytes = 0;
  const slow = registry.on(
    { kind: "layer" },
    {
      handler: async (_request, response, next) => {
        const write = response.write.bind(response) as (chunk: Buffer) => boolean;
        response.write = ((chunk: Buffer) => {
          const pieces = Array.from({ length: Math.ceil(chunk.length / 4096) }, (_, at) =>
            chunk.subarray(at * 4096, (at + 1) * 4096),
          );
          const send = () => {
            const piece = pieces.shift();
            if (!piece || response.destroyed) return void response.emit("drain");
            write(piece);
            sentBytes += piece.length;
            setTimeout(send, (2 * piece.length) / bytesPerMs);
          };
          send();
          return false;
        }) as typeof response.write;
        await next();
      },
    },
  );
  const { child, result } = startCommand([...OPTIONS, "-j", "2", served.reference, served.dest]);
  while (sentBytes < 1_200_000) await new Promise((resolve) => setTimeout(resolve, 10));
  child.kill("SIGKILL");
  await result;
  const servedBytes = sentBytes;
  await registry.settled();
  slow.remove();
  registry.forget();

  await succeed([served.reference, served.dest]);
  await registry.settled();
  const againBytes = servedBytes + registry.bytesServed() - APP_BYTES;
  t.diagnostic(`${againBytes} bytes again`);
  assert.ok(againBytes <= 2000 * bytesPerMs + 131_072, `${againBytes} bytes again`); // and what the sockets held
  await assertRight(t, served, APP);
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

interface Damage {
  /** What happens to the partial, the journal; `offset` is where a layer lies in the tar. */
  spoil: (partial: string, journal: string, offset: (digest: string) => number) => void;
  /** Bytes that may have to come, at most; what is left undamaged is not fetched again. */
  atMost: number;
}

/**
 * Interrupted with MIDDLE and SMALL whole and so much of LARGE; the config is small enough to
 * forget.
 */
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

for (const isAlive of [true, false]) {
  const words = isAlive ? "that answers other things is asked for the whole" : "is asked no more";
  test(`a registry that meets ranges with silence and ${words}`, async (t) => {
    const { registry, reference, folder, dest } = await serve(t, BIG);
    const [digest = ""] = layerDigests(childOf(BIG));
    registry.on({ digest, times: 1 }, { dropAfter: 20_000_000 });
    await failure(pull(reference, dest, { retries: 0, concurrency: 1 }));
    registry.forget();

    const silence = new Promise(() => {});
    registry.on({ digest, ranged: true }, { wait: silence });
    if (!isAlive) registry.on({ kind: "config" }, { wait: silence });
    const going = pull(reference, dest, { retries: 2, timeoutMs: 500, concurrency: 1 });
    if (isAlive) await going;
    else assert.equal((await failure(going)).code, "TIMEOUT");
    const asked = registry.blobRequests(digest).map(({ range }) => (range ? "a part" : "all"));
    const parts = ["a part", "a part"];
    assert.deepEqual(asked, [...parts, isAlive ? "all" : "a part"]);
    if (isAlive) await assertRight(t, { folder, dest }, BIG);
  });
}

test("a single image, whose config tells its platform, resumes too", async (t) => {
  const single = makeImage({ seed: "one", layers: [700_000, 200_000] });
  const served = await serve(t, single);
  await interrupt(served, 500_000, "SIGKILL");
  await succeed([served.reference, served.dest]);
  await assertRight(t, served, single);
  assert.ok(!existsSync(`${served.dest}.partial`));
});

test("a partial of another image outlives a pull that gets nowhere, and is used by the next", async (t) => {
  const base = makeLayer({ seed: "kept", sizeBytes: 3 * MIB, compression: "none" });
  const [one, two] = ["1", "2"].map((seed) => makeImage({ seed, layers: [base, 70_000] }));
  const served = await serve(t, one as NonNullable<typeof one>);
  const { registry, reference, dest } = served;
  const last = one?.layers[1]?.digest as string;
  const gone = registry.on({ digest: last }, { status: 404 });
  await failure(pull(reference, dest, { concurrency: 1 }));
  gone.remove();
  const held = readFileSync(`${dest}.partial`);
  registry.add(two as NonNullable<typeof two>, "team/app", "1.0");
  const refused = registry.on({ kind: "layer" }, { status: 403 });
  writeFileSync(`${dest}.partial`, held.fill("x", 0, 512)); // no tar at the moment: nothing can be copied from it
  await failure(pull(reference, dest));
  assert.ok(readFileSync(`${dest}.partial.old`).equals(held));
  refused.remove();
  await pull(reference, dest);
  await assertRight(t, served, two as NonNullable<typeof two>);
});

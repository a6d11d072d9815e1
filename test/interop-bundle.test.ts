// Across the gap with real programs: bundles, archives at hand, deltas, and pulls that are killed.
// What is fetched is counted in the log of docker-registry, and on the line to it.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { type AddressInfo, connect, createServer } from "node:net";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import { after, before, describe, type TestContext, test } from "node:test";
import { ociArchive } from "./support/archives.ts";
import { startCommand } from "./support/command.ts";
import {
  digestOf,
  type Format,
  MEDIA,
  makeImage,
  makeImageLookalikes,
  makeLayer,
  readTar,
  type TestContent,
  type TestImage,
  type TestLayer,
} from "./support/image.ts";
import {
  type Containerd,
  type Docker,
  HOST_ARCHITECTURE,
  imgpull,
  interopFolder,
  makePodman,
  manifestDigestInContainerd,
  pushImage,
  type RealRegistry,
  run,
  skipWithout,
  skopeo,
  startContainerd,
  startDocker,
  startRealRegistry,
  takeFromContainerd,
  takeFromDocker,
  treeOf,
} from "./support/interop.ts";
import { blobBytes } from "./support/pull.ts";
import { gate, untilRead } from "./support/registry.ts";

const skip = skipWithout(
  "docker-registry",
  "dockerd",
  "docker",
  "containerd",
  "ctr",
  "podman",
  "skopeo",
  "oras",
  "tar",
);
const HTTP = ["--scheme", "http"];

// ====== Images ======

const platform = `linux/${HOST_ARCHITECTURE}`;
const BASE = ["base-1", "base-2"].map((seed, at) =>
  makeLayer({ seed, sizeBytes: 400_000 + at * 100_000 }),
);

function makeApp(seed: string, format: Format, isOnBase: boolean): TestImage {
  const mediaType = format === "oci" ? MEDIA.ociGzip : MEDIA.dockerGzip;
  const base = isOnBase ? BASE.map((layer) => ({ ...layer, mediaType })) : [];
  return makeImage({
    seed,
    format,
    platform,
    layers: [...base, { sizeBytes: 50_000 }, { sizeBytes: 20_000 }],
  });
}

/** Ten images, five of them on one base, as OCI and as Docker schema 2. */
const BUNDLE = Array.from({ length: 10 }, (_, at) =>
  makeApp(`app-${at}`, at % 2 ? "docker" : "oci", at < 5),
);
const V1 = makeApp("v1", "docker", true);
const V2 = makeApp("v2", "docker", true);
const OWN_OF_V2 = [...V2.blobs.keys()].filter((digest) => !V1.blobs.has(digest)).sort();

/** Every path of the image's root file system, with its kind, mode and content. */
function treeOfImage({ layers }: TestImage): Map<string, string> {
  const files = layers.flatMap(({ files }) => [...files]);
  return new Map(
    files.map(([path, bytes]) =>
      path.endsWith("/")
        ? [path.slice(0, -1), "folder 755"]
        : [path, `file 644 ${digestOf(bytes)}`],
    ),
  );
}

/** All of the image is there; runtimes may add their mount points. */
function assertWhole(rootfs: string, image: TestImage): void {
  const [actual, expected] = [treeOf(rootfs), treeOfImage(image)];
  assert.deepEqual(new Map([...expected.keys()].map((path) => [path, actual.get(path)])), expected);
}

/** By oras, since skopeo pushes no artifacts. */
async function pushContent(content: TestContent, name: string): Promise<void> {
  const layout = interopFolder("artifact");
  for (const [entry, bytes] of ociArchive([content])) {
    mkdirSync(join(layout, entry, ".."), { recursive: true });
    if (typeof bytes === "string" || Buffer.isBuffer(bytes))
      writeFileSync(join(layout, entry), bytes);
  }
  const from = ["--from-oci-layout", `${layout}@${content.digest}`];
  await run(["oras", "cp", ...from, "--to-plain-http", name]);
}

// ====== Moments ======

/**
 * As random as they need be, and the same at every run: of the image's bytes, the part that is
 * there at a kill.
 */
const MOMENTS = Array.from(
  { length: 10 },
  (_, at) => createHash("sha256").update(`moment ${at}`).digest().readUInt32BE() / 2 ** 32,
);

interface Line {
  host: string;
  /** What came from the registry since this was last asked. */
  takeBytes: () => number;
  /** From now on it carries so many bytes and then, until there is another limit, nothing more. */
  limit: (bytes: number) => void;
  /** Settles when it has carried all that it may, and the other side has read that. */
  spent: () => Promise<void>;
}

/** A line to the registry that is counted, and that goes dead where the test says so. */
async function startLine(t: TestContext, registryPort: number): Promise<Line> {
  let [carriedBytes, limitBytes] = [0, Infinity];
  let [spent, opened] = [gate(), gate()];
  async function* carry(chunks: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
    for await (const chunk of chunks) {
      const allowed = chunk.subarray(0, limitBytes - carriedBytes);
      carriedBytes += allowed.length;
      yield allowed;
      if (carriedBytes < limitBytes) continue;
      spent.open();
      await opened.promise;
    }
  }
  const server = createServer((client) => {
    const registry = connect(registryPort, "127.0.0.1");
    client.once("close", () => registry.destroy());
    pipeline(client, registry).catch(() => client.destroy());
    pipeline(registry, carry, client).catch(() => client.destroy());
  }).listen(0, "127.0.0.1");
  t.after(() => server.close());
  await once(server, "listening");
  const host = `localhost:${(server.address() as AddressInfo).port}`;
  return {
    host,
    takeBytes: () => {
      const taken = carriedBytes;
      carriedBytes = 0;
      return taken;
    },
    limit: (bytes) => {
      limitBytes = bytes;
      opened.open();
      [spent, opened] = [gate(), gate()];
    },
    spent: async () => {
      await spent.promise;
      await untilRead({ host });
    },
  };
}

// ====== Tests ======

describe("interop across the gap", { skip }, () => {
  let registry: RealRegistry;
  let containerd: Containerd;
  let docker: Docker;
  let names: string[];
  let app: string;

  before(async () => {
    registry = await startRealRegistry();
    containerd = await startContainerd();
    docker = await startDocker(containerd);
    names = BUNDLE.map((_, at) => `${registry.host}/team/app-${at}:v1`);
    for (const [at, name] of names.entries()) await pushImage(BUNDLE[at] as TestImage, name);
    app = `${registry.host}/team/app`;
    await pushImage(V1, `${app}:v1`);
    await pushImage(V2, `${app}:v2`);
  });

  after(async () => {
    await docker?.stop();
    await containerd?.stop();
    await registry?.stop();
  });

  /**
   * The blobs that the registry has served since it was last asked, as often as it has; none in
   * parts.
   */
  async function fetchedBlobs(): Promise<string[]> {
    const served = await registry.takeServed();
    assert.deepEqual(
      served.filter(({ status }) => status !== 200),
      [],
    );
    return served.map(({ digest }) => digest).sort();
  }

  async function pullUndisturbed(name: string): Promise<string> {
    const tar = join(interopFolder("pulled"), "image.tar");
    await imgpull([name, tar, ...HTTP]);
    await registry.takeServed();
    return tar;
  }

  test("ten images, five on one base: each blob once, in the tar and on the line; every name loads", async (t) => {
    const tar = join(interopFolder("pulled"), "bundle.tar");
    await registry.takeServed();
    await imgpull([...names, tar, ...HTTP]);
    const blobs = new Map(BUNDLE.flatMap(({ blobs }) => [...blobs]));
    assert.equal(blobs.size, 10 + 10 * 2 + BASE.length);
    assert.deepEqual(await fetchedBlobs(), [...blobs.keys()].sort());
    const blobsBytes = [...blobs.values()].reduce((sum, { length }) => sum + length, 0);
    const overheadBytes = statSync(tar).size - blobsBytes;
    assert.ok(
      overheadBytes > 0 && overheadBytes < 64 * 1024,
      `${overheadBytes} bytes beside the blobs`,
    );

    const loadedLines = names.map((name) => `Loaded image: ${name}\n`).join("");
    await t.test("docker load", async () => {
      assert.equal(await docker.docker("load", "--input", tar), loadedLines);
      const ids = await docker.docker("image", "inspect", "--format", "{{.Id}}", ...names);
      assert.deepEqual(
        ids.trim().split("\n"),
        BUNDLE.map(({ config }) => config.digest),
      );
      for (const [at, name] of names.entries()) {
        if (at === 0 || at === 9)
          assertWhole(await takeFromDocker(docker, name), BUNDLE[at] as TestImage);
        else await docker.docker("image", "rm", name);
      }
    });
    await t.test("podman load", async () => {
      const podman = makePodman();
      assert.equal(await podman("load", "--input", tar), loadedLines);
      const ids = await podman("image", "inspect", "--format", "{{.Id}}", ...names);
      assert.deepEqual(
        ids
          .trim()
          .split("\n")
          .map((id) => `sha256:${id}`),
        BUNDLE.map(({ config }) => config.digest),
      );
      for (const at of [0, 9]) {
        assertWhole(
          (await podman("image", "mount", names[at] ?? "")).trim(),
          BUNDLE[at] as TestImage,
        );
      }
    });
    await t.test("ctr images import", async () => {
      await containerd.ctr("images", "import", "--snapshotter", "native", tar);
      for (const [at, name] of names.entries()) {
        assert.equal(await manifestDigestInContainerd(containerd, name), BUNDLE[at]?.digest);
      }
      for (const at of [0, 9]) {
        const rootfs = await takeFromContainerd(containerd, names[at] ?? "", HOST_ARCHITECTURE);
        assertWhole(rootfs, BUNDLE[at] as TestImage);
      }
      await containerd.ctr("images", "rm", "--sync", ...names.slice(1, 9));
    });
  });

  test("v2 pulled over v1's tar fetches only its own blobs", async () => {
    const tar = await pullUndisturbed(`${app}:v1`);
    await imgpull([`${app}:v2`, tar, ...HTTP]);
    assert.deepEqual(await fetchedBlobs(), OWN_OF_V2);
    assert.ok(readFileSync(tar).equals(readFileSync(await pullUndisturbed(`${app}:v2`))));
    assert.deepEqual(readdirSync(join(tar, "..")), ["image.tar"]);
  });

  interface Archiver {
    make: (name: string, tar: string) => Promise<unknown>;
    /** It keeps layers as the registry has them: unpacked ones have other digests. */
    isPacked: boolean;
    /** A program that no other test needs. */
    program?: string;
  }

  const archivers: Record<string, Archiver> = {
    imgpull: { make: (name, tar) => imgpull([name, tar, ...HTTP]), isPacked: true },
    "crane pull": {
      make: (name, tar) => run(["crane", "pull", name, tar]),
      isPacked: true,
      program: "crane",
    },
    "docker save": {
      make: async (name, tar) => {
        await docker.docker("pull", name);
        await docker.docker("save", "--output", tar, name);
        await docker.docker("image", "rm", name);
      },
      isPacked: false,
    },
    "skopeo copy docker-archive:": {
      make: (name, tar) =>
        skopeo("copy", "--src-tls-verify=false", `docker://${name}`, `docker-archive:${tar}`),
      isPacked: false,
    },
    "skopeo copy oci-archive:": {
      make: (name, tar) =>
        skopeo("copy", "--src-tls-verify=false", `docker://${name}`, `oci-archive:${tar}`),
      isPacked: true,
    },
  };

  for (const [program, archiver] of Object.entries(archivers)) {
    const does = archiver.isPacked
      ? "saves its layers"
      : "saves none of its layers, and does no harm";
    const skip = archiver.program !== undefined && skipWithout(archiver.program);
    test(`--reuse of v1 by ${program} ${does}`, { skip }, async () => {
      const folder = interopFolder("reuse");
      const [old, tar] = [join(folder, "old.tar"), join(folder, "new.tar")];
      await archiver.make(`${app}:v1`, old);
      await registry.takeServed();
      const before = readFileSync(old);
      await imgpull([`${app}:v2`, tar, "--reuse", old, ...HTTP]);
      assert.deepEqual(
        await fetchedBlobs(),
        archiver.isPacked ? OWN_OF_V2 : [...V2.blobs.keys()].sort(),
      );
      assert.ok(readFileSync(tar).equals(readFileSync(await pullUndisturbed(`${app}:v2`))));
      assert.ok(readFileSync(old).equals(before));
    });
  }

  test("kill -9 at ten random moments, then the same command: right, for at most 1.1 times the bytes", async (t) => {
    const layers = [24, 20, 16, 12, 8, 6, 4, 2].map((each) => each * 1_000_000);
    const image = makeImage({ seed: "large", platform, layers });
    const imageBytes = blobBytes(image);
    await pushImage(image, `${registry.host}/team/large:v1`);
    const line = await startLine(t, registry.port);
    const tar = join(interopFolder("pulled"), "image.tar");
    // Each connection may lose a MiB that it has gathered and one on its way to disk: of four, that
    // is a tenth at most.
    const args = [`${line.host}/team/large:v1`, tar, ...HTTP, "-j", "4"];
    await imgpull(args);
    const undisturbed = digestOf(readFileSync(tar));
    for (const moment of MOMENTS) {
      rmSync(tar);
      line.takeBytes();
      line.limit(Math.round(moment * imageBytes));
      const { child, result } = startCommand(args);
      await Promise.race([line.spent(), result]);
      child.kill("SIGKILL");
      const { signal, stderr } = await result;
      assert.equal(signal, "SIGKILL", `it ended before its time: ${stderr}`);
      line.limit(Infinity);
      await imgpull(args);
      const times = line.takeBytes() / imageBytes;
      t.diagnostic(
        `killed at ${moment.toFixed(3)} of the bytes: ${times.toFixed(3)} times the bytes in all`,
      );
      assert.equal(digestOf(readFileSync(tar)), undisturbed);
      assert.deepEqual(readdirSync(join(tar, "..")), ["image.tar"]);
      assert.ok(times <= 1.1, `${times} times, killed at ${moment}`);
    }
  });

  test("a delta loads on top of its base, and nowhere else", async (t) => {
    const base = await pullUndisturbed(`${app}:v1`);
    const delta = join(interopFolder("pulled"), "delta.tar");
    await imgpull([`${app}:v2`, delta, "--since", base, ...HTTP]);
    assert.deepEqual(await fetchedBlobs(), OWN_OF_V2);
    for (const { digest } of BASE) {
      assert.ok(
        readTar(readFileSync(delta)).every(
          ({ name }) => !name.endsWith(digest.slice("sha256:".length)),
        ),
      );
    }
    const [v1, v2] = [`${app}:v1`, `${app}:v2`];
    await t.test("docker load", async () => {
      await assert.rejects(docker.docker("load", "--input", delta), /no such file or directory/);
      await docker.docker("load", "--input", base);
      assert.equal(await docker.docker("load", "--input", delta), `Loaded image: ${v2}\n`);
      await docker.docker("image", "rm", v1);
      assert.equal(
        (await docker.docker("image", "inspect", "--format", "{{.Id}}", v2)).trim(),
        V2.config.digest,
      );
      assertWhole(await takeFromDocker(docker, v2), V2);
    });
    await t.test("podman load", async () => {
      await assert.rejects(makePodman()("load", "--input", delta), /no such file or directory/);
      const podman = makePodman();
      await podman("load", "--input", base);
      assert.equal(await podman("load", "--input", delta), `Loaded image: ${v2}\n`);
      assertWhole((await podman("image", "mount", v2)).trim(), V2);
    });
    await t.test("ctr images import", async () => {
      const load = (tar: string, ...options: string[]) =>
        containerd.ctr("images", "import", "--snapshotter", "native", ...options, tar);
      await assert.rejects(load(delta), /not found/);
      // This is what the warning is about: the image is listed, and has no layers.
      await load(delta, "--no-unpack");
      assert.equal(await manifestDigestInContainerd(containerd, v2), V2.digest);
      await containerd.ctr("images", "rm", "--sync", v2);
      await load(base);
      await load(delta);
      assertWhole(await takeFromContainerd(containerd, v2, HOST_ARCHITECTURE), V2);
      await containerd.ctr("images", "rm", "--sync", v1);
    });
  });

  test("an image and what only looks like one in one tar: every loader takes the image", async (t) => {
    const name = `${registry.host}/team/lookalike`;
    await pushImage(V1, `${name}:app`);
    const lookalikes = Object.entries(makeImageLookalikes());
    for (const [tag, content] of lookalikes) await pushContent(content, `${name}:${tag}`);
    const tar = join(interopFolder("pulled"), "lookalike.tar");
    const others = lookalikes.map(([tag]) => `${name}:${tag}`);
    for (const order of [
      [...others, `${name}:app`],
      [`${name}:app`, ...others],
    ]) {
      await imgpull([...order, tar, ...HTTP]);
      const loaded = `Loaded image: ${name}:app\n`;
      await t.test("docker load", async () => {
        assert.equal(await docker.docker("load", "--input", tar), loaded);
        assertWhole(await takeFromDocker(docker, `${name}:app`), V1);
      });
      await t.test("podman load", async () => {
        assert.equal(await makePodman()("load", "--input", tar), loaded);
      });
      await t.test("skopeo, of docker's archive", async () => {
        await skopeo("copy", `docker-archive:${tar}`, `dir:${interopFolder("copied")}`);
      });
    }
  });

  test("a delta that is not on top of its base's layers: loaded after the base, it is whole", async (t) => {
    const mediaType = MEDIA.dockerGzip;
    const layerOf = (seed: string) => ({ ...makeLayer({ seed, sizeBytes: 30_000 }), mediaType });
    const [os1, os2, lib, own] = ["os1", "os2", "lib", "own"].map(layerOf);
    const image = (seed: string, layers: unknown[]) =>
      makeImage({ seed, format: "docker", platform, layers: layers as TestLayer[] });
    const [rebaseOld, rebaseNew] = [image("old", [os1, lib]), image("new", [os2, lib])];
    const cases: [how: string, before: TestImage, after: TestImage, omitted: number][] = [
      ["rebased", rebaseOld, rebaseNew, 0],
      ["one layer put in the middle", rebaseOld, image("middle", [os1, own, lib]), 1],
    ];
    for (const [how, before, next, omitted] of cases) {
      const name = `${registry.host}/team/${how.replaceAll(" ", "-")}`;
      await pushImage(before, `${name}:1`);
      await pushImage(next, `${name}:2`);
      const folder = interopFolder("delta");
      const [base, delta] = [join(folder, "base.tar"), join(folder, "delta.tar")];
      await imgpull([`${name}:1`, base, ...HTTP]);
      await imgpull([`${name}:2`, delta, "--since", base, ...HTTP]);
      await imgpull(["--verify", delta, "--since", base]);
      const held = readTar(readFileSync(delta)).map((entry) => entry.name);
      const missing = [...next.blobs.keys()].filter(
        (digest) => !held.some((each) => each.endsWith(digest.slice("sha256:".length))),
      );
      assert.equal(missing.length, omitted, how);

      await t.test(`${how}: docker load`, async () => {
        await docker.docker("load", "--input", base);
        assert.equal(await docker.docker("load", "--input", delta), `Loaded image: ${name}:2\n`);
        assertWhole(await takeFromDocker(docker, `${name}:2`), next);
        await docker.docker("image", "rm", "--force", `${name}:1`);
      });
      await t.test(`${how}: podman load`, async () => {
        const podman = makePodman();
        await podman("load", "--input", base);
        await podman("load", "--input", delta);
        assertWhole((await podman("image", "mount", `${name}:2`)).trim(), next);
      });
      await t.test(`${how}: ctr images import`, async () => {
        for (const tar of [base, delta])
          await containerd.ctr("images", "import", "--snapshotter", "native", tar);
        const rootfs = await takeFromContainerd(containerd, `${name}:2`, HOST_ARCHITECTURE);
        assertWhole(rootfs, next);
        await containerd.ctr("images", "rm", "--sync", `${name}:1`);
      });
    }
  });
});

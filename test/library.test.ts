// The library as its user writes it: options, results, progress, abort and errors of each method.
import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import {
  type ErrorCode,
  ImgpullError,
  type ManifestHolder,
  newPullerOpts,
  type Progress,
  Puller,
  type PullerOpts,
} from "../imgpull.ts";
import { FIRST, fetched, THIRD } from "./support/bundle.ts";
import {
  cleanEnvironment,
  SECRETS,
  type TestScope,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import { digestOf, makeImage, makeMultiPlatform, type TestContent } from "./support/image.ts";
import { blobBytes, blobsOf, childOf, failure, LINUX } from "./support/pull.ts";
import { gate, type Registry, type RegistryOptions, startRegistry } from "./support/registry.ts";

// Puller reads process.env: a developer's proxies and credentials must not count here.
process.env = cleanEnvironment();

const image = makeImage({ seed: "dist", platform: "linux/amd64", layers: [70_000, 4096] });

async function serve(t: TestScope, options: RegistryOptions = {}): Promise<Registry> {
  const registry = await startRegistry(options, t);
  registry.add(image, "team/app", "1.0");
  return registry;
}

function optsFor(registry: Registry, opts: Partial<PullerOpts> = {}): PullerOpts {
  const url = `${registry.host}/team/app:1.0`;
  return { url, scheme: "http", osType: "linux", archType: "amd64", retries: 0, ...opts };
}

test("newPullerOpts, getUrl and getOpts", () => {
  const made = newPullerOpts("docker.io/hello-world:latest");
  const { platform, arch } = process;
  const os = platform === "win32" ? "windows" : platform;
  const architecture = { x64: "amd64", ia32: "386" }[arch as string] ?? arch;
  const url = "docker.io/hello-world:latest";
  assert.deepEqual({ ...made }, { url, scheme: "https", osType: os, archType: architecture });
  const puller = new Puller(made);
  assert.equal(puller.getUrl(), url);
  const defaults = { insecure: false, retries: 5, timeoutMs: 30_000 };
  assert.deepEqual(puller.getOpts(), { ...made, ...defaults });
  assert.deepEqual(new Puller(url).getOpts(), puller.getOpts());
  const byPlatforms = new Puller({ url, platforms: "all" }).getOpts();
  assert.deepEqual([byPlatforms.osType, byPlatforms.archType], [undefined, undefined]);
  made.url = "changed";
  puller.getOpts().url = "changed";
  assert.equal(puller.getOpts().url, url);
  assert.equal(new Puller("alpine").getOpts().url, "alpine");
});

// ====== pullTar ======

test("pullTar says what DEST now holds, and what came over the line", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm/v7"], {
    layers: [70_000, 4096, 5000],
  });
  const registry = await startRegistry({}, t);
  registry.add(index, "team/app", "1.0");
  const dest = join(temporaryFolder(t), "a.tar");
  const puller = new Puller(optsFor(registry, { archType: "arm", variant: "v7" }));
  const { fetchedBytes, sizeBytes, ...result } = await puller.pullTar(dest);
  assert.deepEqual(result, {
    name: `${registry.host}/team/app:1.0`,
    digest: index.children[1]?.digest,
    platform: "linux/arm/v7",
    layers: 3,
  });
  assert.equal(sizeBytes, statSync(dest).size);
  assert.equal(fetchedBytes, registry.bytesServed());
  const again = await puller.pullTar(dest);
  assert.deepEqual([again.fetchedBytes, again.sizeBytes], [0, sizeBytes]);
});

test("onProgress never falls and ends with all of it", async (t) => {
  const registry = await serve(t);
  const seen: Progress[] = [];
  const puller = new Puller(
    optsFor(registry, {
      onProgress: (progress) => {
        seen.push({ ...progress });
      },
    }),
  );
  await puller.pullTar(join(temporaryFolder(t), "a.tar"));
  const phases = ["resolve", "fetch", "finish"];
  for (const [
    position,
    { phase, doneBytes, totalBytes, blobsDone, blobsTotal },
  ] of seen.entries()) {
    const before = seen[position - 1];
    assert.ok(doneBytes >= (before?.doneBytes ?? 0) && doneBytes <= totalBytes);
    assert.ok(blobsDone >= (before?.blobsDone ?? 0) && blobsDone <= blobsTotal);
    assert.ok(phases.indexOf(phase) >= phases.indexOf(before?.phase ?? "resolve"));
  }
  assert.deepEqual(phases, [...new Set(seen.map(({ phase }) => phase))]);
  const last = seen.at(-1);
  assert.ok(last && last.doneBytes === last.totalBytes && last.blobsDone === last.blobsTotal);
  assert.ok(last.totalBytes >= image.layers.reduce((sum, { bytes }) => sum + bytes.length, 0));
});

test("the total is told before the first byte comes", { timeout: 30_000 }, async (t) => {
  const { opts, folder, registry } = await serveLibrary(t, makeImage({ layers: [70_000] }));
  const told = gate();
  registry.on({ kind: "layer" }, { wait: told.promise });
  const onProgress = ({ totalBytes, doneBytes }: Progress): void => {
    if (totalBytes > 0 && doneBytes === 0) told.open();
  };
  await new Puller({ ...opts, onProgress }).pullTar(join(folder, "app.tar"));
});

// ====== Manifests and blobs ======

async function serveLibrary(t: TestContext, content: TestContent, options: RegistryOptions = {}) {
  const registry = await startRegistry(options, t);
  const url = registry.add(content, "team/app", "1.0");
  const opts: PullerOpts = { url, ...LINUX };
  return { registry, url, puller: new Puller(opts), folder: temporaryFolder(t), opts };
}

test("pullManifest gives the exact bytes of the index or of the platform's manifest", async (t) => {
  const { puller, url } = await serveLibrary(t, FIRST);
  const expected = (content: TestContent): ManifestHolder => ({
    mediaType: content.mediaType,
    digest: content.digest,
    bytes: content.bytes,
    imageUrl: url,
    manifest: JSON.parse(String(content.bytes)),
  });
  assert.deepEqual(await puller.pullManifest("list"), expected(FIRST));
  assert.deepEqual(await puller.pullManifest("image"), expected(childOf(FIRST, 1)));
  assert.deepEqual(await puller.getManifest(), expected(FIRST));
});

test("pullManifest of a single image: the image, and no list", async (t) => {
  const { puller } = await serveLibrary(t, THIRD);
  assert.equal((await puller.pullManifest("image")).digest, THIRD.digest);
  assert.equal((await puller.getManifest()).digest, THIRD.digest);
  const error = await failure(puller.pullManifest("list"));
  assert.match(error.message, /one image, without a list: ask for `manifest` image/);
  assert.equal((await failure(puller.pullManifest("other" as "list"))).code, "BAD_OPTION");
});

test("headManifest is one HEAD where that says enough, and a GET where it does not", async (t) => {
  const { puller, registry } = await serveLibrary(t, FIRST);
  const head = { mediaType: FIRST.mediaType, digest: FIRST.digest, size: FIRST.bytes.length };
  assert.deepEqual(await puller.headManifest(), head);
  assert.deepEqual(
    registry.requests.map(({ method, kind }) => `${method} ${kind}`),
    ["HEAD manifest"],
  );
  for (const headers of [
    { "docker-content-digest": null },
    { "content-length": null },
    { "content-type": "text/plain" },
    { "docker-content-digest": "sha256:nonsense" },
  ] as Record<string, string | null>[]) {
    const poor = registry.on({ kind: "manifest", method: "HEAD" }, { headers });
    assert.deepEqual(await puller.headManifest(), head, JSON.stringify(headers));
    assert.equal(poor.hits, 1);
    poor.remove();
  }
  registry.remove("team/app", "1.0");
  assert.equal((await failure(puller.headManifest())).code, "NOT_FOUND");
});

test("pullBlobs leaves every blob as dir/HEX; those that are there are verified and kept", async (t) => {
  const image = childOf(FIRST, 1);
  const { puller, registry, folder } = await serveLibrary(t, FIRST);
  const dir = join(folder, "made/here");
  const holder = await puller.pullManifest("image");
  await puller.pullBlobs(holder, dir);
  const blobs = blobsOf(image);
  const hex = (digest: string): string => digest.slice(digest.indexOf(":") + 1);
  assert.deepEqual(readdirSync(dir), blobs.map(hex).sort());
  for (const digest of blobs) assert.equal(digestOf(readFileSync(join(dir, hex(digest)))), digest);

  const kept = statSync(join(dir, hex(blobs[0] ?? ""))).ino;
  const [, spoiled = "", gone = ""] = blobs;
  writeFileSync(join(dir, hex(spoiled)), readFileSync(join(dir, hex(spoiled))).fill(7, 100, 110));
  rmSync(join(dir, hex(gone)));
  registry.forget();
  await puller.pullBlobs(holder, dir);
  assert.deepEqual(fetched(registry), [spoiled, gone].sort());
  assert.equal(statSync(join(dir, hex(blobs[0] ?? ""))).ino, kept);
  for (const digest of blobs) assert.equal(digestOf(readFileSync(join(dir, hex(digest)))), digest);
  assert.deepEqual(readdirSync(dir), blobs.map(hex).sort());
});

test("pullBlobs: resumes, verifies, takes sha512, and refuses a list", async (t) => {
  const image = makeImage({ seed: "wide", algorithm: "sha512", layers: [200_000, 9000] });
  const { registry, folder, opts } = await serveLibrary(t, image);
  const url = registry.add(image, "team/app");
  const puller = new Puller({ ...opts, url, retries: 0 });
  const holder = await puller.pullManifest("image");
  const [large] = image.layers.map(({ digest }) => digest);
  const drop = registry.on({ digest: large ?? "", times: 1 }, { dropAfter: 50_000 });
  assert.equal((await failure(puller.pullBlobs(holder, folder))).code, "NETWORK");
  assert.equal(drop.hits, 1);
  await puller.pullBlobs(holder, folder);
  assert.equal(registry.blobRequests(large).at(-1)?.range, "bytes=50000-199999");
  assert.deepEqual(
    readdirSync(folder).sort(),
    blobsOf(image)
      .map((digest) => digest.split(":")[1])
      .sort(),
  );

  registry.on({ digest: large ?? "" }, { corruptAt: 60_000 });
  const other = join(folder, "other");
  assert.equal((await failure(puller.pullBlobs(holder, other))).code, "DIGEST_MISMATCH");
  assert.ok(!existsSync(join(other, large?.split(":")[1] ?? "")));
  const list = await serveLibrary(t, FIRST);
  const index = await list.puller.pullManifest("list");
  assert.equal((await failure(list.puller.pullBlobs(index, other))).code, "NOT_AN_IMAGE");
});

test("pullTar returns what DEST now holds", async (t) => {
  const { puller, folder, url } = await serveLibrary(t, FIRST);
  const dest = join(folder, "app.tar");
  const image = childOf(FIRST, 1);
  const held = {
    name: url,
    digest: image.digest,
    platform: "linux/amd64",
    layers: 3,
    sizeBytes: 0,
  };
  const first = await puller.pullTar(dest);
  assert.deepEqual(first, {
    ...held,
    sizeBytes: statSync(dest).size,
    fetchedBytes: blobBytes(image),
  });
  assert.deepEqual(await puller.pullTar(dest), { ...first, fetchedBytes: 0 });
});

test("pullBlobs: every blob as HEX in the folder, verified; those that are there are kept", async (t) => {
  const registry = await serve(t);
  const puller = new Puller(optsFor(registry));
  const holder = await puller.pullManifest("image");
  const folder = join(temporaryFolder(t), "made/blobs");
  const hexOf = (digest: string) => digest.split(":")[1] ?? "";
  const check = () => {
    assert.deepEqual(readdirSync(folder).sort(), [...image.blobs.keys()].map(hexOf).sort());
    for (const digest of image.blobs.keys())
      assert.equal(digestOf(readFileSync(join(folder, hexOf(digest)))), digest);
  };
  await puller.pullBlobs(holder, folder);
  check();
  const [first, second] = image.layers;
  assert.ok(first && second);
  const damaged = Buffer.from(first.bytes);
  damaged[9] = (damaged[9] ?? 0) ^ 1;
  writeFileSync(join(folder, hexOf(first.digest)), damaged);
  rmSync(join(folder, hexOf(second.digest)));
  registry.forget();
  await puller.pullBlobs(holder, folder);
  check();
  const asked = new Set(registry.blobRequests().map(({ digest }) => digest));
  assert.deepEqual([...asked].sort(), [first.digest, second.digest].sort());

  const index = makeMultiPlatform(["linux/amd64"]);
  registry.add(index, "team/app", "2.0");
  const other = new Puller(optsFor(registry, { url: `${registry.host}/team/app:2.0` }));
  await assert.rejects(other.pullBlobs(await other.pullManifest("list"), folder), {
    code: "NOT_AN_IMAGE",
  });
});

// ====== Abort, errors, two of them ======

test("two pullers in one process share nothing", async (t) => {
  const registry = await serve(t, { auth: "basic" });
  const folder = temporaryFolder(t);
  const known = new Puller(optsFor(registry, { username: USER, password: SECRETS.password }));
  const stranger = new Puller(optsFor(registry));
  await known.pullTar(join(folder, "a.tar"));
  await assert.rejects(stranger.pullTar(join(folder, "b.tar")), {
    code: "UNAUTHORIZED",
    status: 401,
  });
  await known.pullTar(join(folder, "c.tar"));
  assert.deepEqual(readdirSync(folder).sort(), ["a.tar", "c.tar"]);
});

test("signal stops everything at once, with sockets closed", async (t) => {
  const registry = await serve(t);
  const folder = temporaryFolder(t);
  const aborted = new Puller(optsFor(registry, { signal: AbortSignal.abort() }));
  await assert.rejects(aborted.pullTar(join(folder, "a.tar")), { code: "ABORTED" });
  assert.equal(registry.connections(), 0);
  const controller = new AbortController();
  const rule = registry.on({ kind: "layer" }, { stallAfter: 10 });
  const pulling = new Puller(optsFor(registry, { signal: controller.signal })).pullTar(
    join(folder, "a.tar"),
  );
  await rule.reached;
  controller.abort();
  await assert.rejects(pulling, { name: "ImgpullError", code: "ABORTED" });
  assert.ok(!readdirSync(folder).includes("a.tar"));
  // A stalled answer ends only when its socket is closed: this would hang if one were left open.
  await registry.settled();
});

const MIB = 1024 * 1024;

test("an abort in the tick after any report ends in ABORTED, and in nothing uncaught", async (t) => {
  const content = makeImage({ seed: "ticks", layers: [2 * MIB, MIB + 5000] });
  const { opts, folder } = await serveLibrary(t, content);
  for (let round = 0; round < 70; round += 1) {
    const stop = new AbortController();
    let reports = 0;
    const onProgress = (): void => {
      reports += 1;
      if (reports === round % 7) process.nextTick(() => stop.abort());
    };
    const puller = new Puller({ ...opts, signal: stop.signal, onProgress });
    const outcome = await puller.pullTar(join(folder, `${round}.tar`)).then(
      () => "DONE",
      (error: ImgpullError) => error.code,
    );
    assert.ok(outcome === "DONE" || outcome === "ABORTED", outcome);
  }
});

test("errors have a code, a status where there was one, and their cause", async (t) => {
  const registry = await serve(t);
  const closed = await startRegistry();
  await closed.close();
  const dest = join(temporaryFolder(t), "a.tar");
  const cases: [ErrorCode, Partial<PullerOpts>, string, object?][] = [
    ["NOT_FOUND", { url: `${registry.host}/team/app:none` }, dest, { status: 404 }],
    ["NO_PLATFORM", { archType: "riscv64" }, dest],
    ["DISK", {}, join(dest, "no/such/folder/a.tar")],
    ["NETWORK", { url: `${closed.host}/team/app:1.0` }, dest],
    ["TLS", { caCert: join(dest, "none.pem"), scheme: "https" }, dest],
  ];
  for (const [code, opts, to, fields = {}] of cases) {
    await assert.rejects(new Puller(optsFor(registry, opts)).pullTar(to), (error) => {
      assert.ok(error instanceof ImgpullError && error instanceof Error);
      assert.deepEqual([error.name, error.code], ["ImgpullError", code], error.message);
      assert.deepEqual({ ...error, ...fields }, { ...error });
      if (code === "NETWORK")
        assert.equal((error.cause as NodeJS.ErrnoException).code, "ECONNREFUSED");
      return true;
    });
  }
  const wrong: Record<string, unknown>[] = [
    { scheme: "ftp" },
    { concurrency: 0 },
    { concurrency: 1.5 },
    { retries: -1 },
    { timeoutMs: 0 },
    { timeoutMs: NaN },
    { tlsCert: "c.pem" },
    { tlsKey: "k.pem" },
    { password: "x" },
    { token: "x", username: "me", password: "y" },
    { namespace: "https://quay.io" },
    { token: "two\nlines" },
  ];
  for (const opts of wrong) {
    assert.throws(
      () => new Puller(optsFor(registry, opts as Partial<PullerOpts>)),
      { code: "BAD_OPTION" },
      JSON.stringify(opts),
    );
  }
});

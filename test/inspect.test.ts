// --list-tar and --verify: tars of our own and of other programs, whole, damaged, cut off and
// hostile.
import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import {
  closeSync,
  cpSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import * as zlib from "node:zlib";
import { verifyTar } from "../imgpull.ts";
import {
  craneTar,
  type Entry,
  hexOf,
  json,
  ociArchive,
  oldDockerSave,
  paxRecord,
  type RawEntry,
  rawEntry,
  rawTar,
  skopeoDockerArchive,
  tarOf,
} from "./support/archives.ts";
import { runCommand, startCommand, type TestScope, temporaryFolder } from "./support/command.ts";
import {
  digestOf,
  MEDIA,
  makeAttestation,
  makeHelmChart,
  makeImage,
  makeIndex,
  makeLayer,
  makeManifest,
  makeMultiPlatform,
  makeOrasArtifact,
  pseudoRandom,
  readTar,
  type TestContent,
  type TestImage,
  type TestLayer,
  writeTar,
} from "./support/image.ts";
import { runMain } from "./support/main.ts";
import { blobName, filesOf } from "./support/pull.ts";
import { type Registry, startRegistry } from "./support/registry.ts";

// ====== The tars ======

const cleanUps: (() => unknown)[] = [];
const scope: TestScope = { after: (cleanUp) => cleanUps.push(cleanUp) };
let registry: Registry;
let folder: string;

before(async () => {
  registry = await startRegistry({}, scope);
  folder = temporaryFolder(scope);
});
after(async () => {
  for (const cleanUp of cleanUps.reverse()) await cleanUp();
});

let made = 0;

/** A file of these bytes. */
function fileOf(bytes: Buffer): string {
  made += 1;
  const file = join(folder, `${made}.tar`);
  writeFileSync(file, bytes);
  return file;
}

async function pullWith(references: string[], args: string[] = []): Promise<string> {
  made += 1;
  const file = join(folder, `${made}.tar`);
  const platform = args.includes("--platform") ? [] : ["--platform", "linux/amd64"];
  const result = await runMain([
    "--scheme",
    "http",
    "-q",
    ...platform,
    ...args,
    ...references,
    file,
  ]);
  assert.equal(result.exitCode, 0, result.stderr);
  return file;
}

function serve(content: TestContent, tag: string): string {
  return registry.add(content, "team/app", tag);
}

const pull = (content: TestContent, tag: string, args: string[] = []): Promise<string> =>
  pullWith([serve(content, tag)], args);

// ====== What the command says ======

interface Row {
  name: string;
  digest: string;
  platform: string;
  sizeBytes: number;
  layers: { digest: string; size: number; present: boolean }[];
}

async function list(file: string): Promise<Row[]> {
  const { exitCode, stdout, stderr } = await runMain(["--list-tar", file]);
  assert.deepEqual([exitCode, stderr], [0, ""], file);
  return String(stdout)
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line) as Row);
}

/**
 * No letter but printable ones and line ends: nothing that moves a cursor, changes a colour or
 * turns text around.
 */
function assertHarmless(text: string): void {
  assert.doesNotMatch(text, /[^\P{Cc}\n]|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/u);
}

async function passes(file: string): Promise<string> {
  const { exitCode, stdout, stderr } = await runMain(["--verify", file]);
  assert.deepEqual([exitCode, stderr], [0, ""]);
  return String(stdout);
}

async function fails(file: string, ...says: (RegExp | string)[]): Promise<string> {
  const { exitCode, stdout, stderr } = await runMain(["--verify", file]);
  assert.deepEqual([exitCode, String(stdout)], [1, ""], stderr);
  assert.ok(stderr.startsWith(`imgpull: ${file}: `), stderr);
  for (const each of says) {
    assert.ok(
      typeof each === "string" ? stderr.includes(each) : each.test(stderr),
      `${each}: ${stderr}`,
    );
  }
  assertHarmless(stderr);
  return stderr;
}

const rowOf = (image: TestImage, name: string, digest = image.digest): Row => ({
  name,
  digest,
  platform: `${image.platform.os}/${image.platform.architecture}`,
  sizeBytes: image.layers.reduce((sum, { bytes }) => sum + bytes.length, 0),
  layers: image.layers.map((layer) => ({
    digest: layer.digest,
    size: layer.bytes.length,
    present: true,
  })),
});

// ====== Whole tars of our own ======

test("one image, by tag and by digest, Docker's and OCI's, sha512", async () => {
  for (const [tag, image] of Object.entries({
    oci: makeImage({ seed: "look-oci" }),
    docker: makeImage({ seed: "look-docker", format: "docker" }),
    sha512: makeImage({ seed: "look-512", algorithm: "sha512" }),
  })) {
    const reference = serve(image, tag);
    const file = await pullWith([reference]);
    assert.deepEqual(await list(file), [rowOf(image, reference)]); // by the algorithm by which the registry knows it
    assert.match(
      await passes(file),
      /: 1 image, 4 blobs .*2 layers .*\nloads in docker, podman/,
      tag,
    );
    const bare = `${registry.host}/team/app@${image.digest}`;
    const pinned = await pullWith([bare]);
    assert.deepEqual(await list(pinned), [rowOf(image, bare)]);
    await passes(pinned);
  }
});

test("several images, and a layer that they share, unpacked once", async () => {
  const base = makeLayer({ seed: "look-base", sizeBytes: 300_000 });
  const images = [1, 2, 3].map((each) =>
    makeImage({ seed: `look-${each}`, layers: [base, 4096, base] }),
  );
  const references = images.map((image, at) => serve(image, `many-${at}`));
  const file = await pullWith(references);
  assert.deepEqual(
    await list(file),
    images.map((image, at) => rowOf(image, references[at] as string)),
  );
  assert.match(await passes(file), /3 images, 10 blobs .*4 layers/);
});

test("one image under two names, without layers, with an empty and with many layers", async () => {
  const image = makeImage({ seed: "look-names" });
  const references = [serve(image, "name-1"), serve(image, "name-2")];
  assert.deepEqual(
    (await list(await pullWith(references))).map(({ name }) => name),
    references,
  );
  assert.deepEqual(
    (await list(await pull(makeImage({ layers: [] }), "none"))).map(({ layers }) => layers),
    [[]],
  );
  const many = makeImage({ seed: "look-many", layers: Array.from({ length: 40 }, () => 4096) });
  const { exitCode, stdout, stderr } = await runCommand([
    "--verify",
    await pull(many, "many-layers"),
  ]);
  assert.deepEqual([exitCode, stderr], [0, ""]); // and no warning of Node's
  assert.match(String(stdout), /40 layers/);
});

test("every platform, with attestations: each is listed; indexes inside indexes too", async () => {
  const platforms = ["linux/arm64", "linux/amd64", "linux/arm/v7"];
  const index = makeMultiPlatform(platforms, { seed: "look-all", attestations: true });
  const file = await pull(index, "all", ["--platform", "all"]);
  const rows = await list(file);
  assert.deepEqual(
    rows.map(({ digest }) => digest),
    index.children.map(({ digest }) => digest),
  );
  assert.deepEqual(rows.map(({ platform }) => platform).slice(0, 4), [
    ...platforms,
    "unknown/unknown",
  ]);
  assert.match(await passes(file), /6 images/);
  const nested = makeIndex([makeIndex([index]), makeImage({ seed: "look-nested" })]);
  const deep = await pull(nested, "deep", ["--platform", "all"]);
  assert.equal((await list(deep)).length, 7);
  assert.match(await passes(deep), /7 images/);
});

test("what is not an image: listed, hashed, and said to load where it does", async () => {
  const artifact = makeOrasArtifact("look");
  const file = await pull(artifact, "artifact");
  const [row, ...more] = await list(file);
  assert.deepEqual([row?.digest, row?.platform, more.length], [artifact.digest, "", 0]);
  const said = await passes(file);
  assert.match(said, /loads in skopeo oci-archive:FILE\n/);
  assert.doesNotMatch(said, /docker|podman|ctr/); // "mismatched image rootfs and manifest layers", says ctr
  await passes(
    await pullWith([serve(makeHelmChart("look"), "chart"), serve(makeImage(), "beside")]),
  );
});

test("a --since tar: its table says what is not here, --verify that it needs its base", async () => {
  const [base, top] = [makeLayer({ seed: "since-base" }), makeLayer({ seed: "since-top" })];
  const baseFile = await pull(makeImage({ seed: "since-1", layers: [base] }), "since-1");
  const reference = serve(makeImage({ seed: "since-2", layers: [base, top] }), "since-2");
  const file = await pullWith([reference], ["--since", baseFile]);
  const [row] = await list(file);
  assert.deepEqual(
    row?.layers.map(({ digest, present }) => [digest, present]),
    [
      [base.digest, false],
      [top.digest, true],
    ],
  );
  const said = await fails(file, /missing.*--since/);
  assert.ok(said.includes(hexOf(base.digest)) && !said.includes(hexOf(top.digest)), said);
});

test("a table on a terminal, lines of JSON elsewhere", async () => {
  const image = makeImage({ seed: "look-table", layers: [4096, 1_500_000] });
  const reference = serve(image, "table");
  const file = await pullWith([reference]);
  const { stdout } = await runMain(["-l", file], { terminalColumns: 80 });
  assert.equal(
    String(stdout),
    [
      `${reference}  linux/amd64  1.5 MB`,
      `        ${image.digest}`,
      ` 4.1 kB ${image.layers[0]?.digest}`,
      ` 1.5 MB ${image.layers[1]?.digest}`,
      "",
    ].join("\n"),
  );
  assert.ok(
    String(stdout)
      .split("\n")
      .every((line) => line.length < 80),
  );
  const piped = await runCommand(["-l", file]);
  assert.deepEqual(
    [piped.exitCode, piped.stderr, JSON.parse(String(piped.stdout))],
    [0, "", rowOf(image, reference)],
  );
});

// ====== Whole tars of others ======

const twice = makeLayer({ seed: "others", compression: "none" });
const plain = makeImage({
  seed: "others",
  layers: [twice, { compression: "none", sizeBytes: 4096 }, twice],
});
const packed = makeImage({ seed: "others-gzip" });

test("docker save's old form: plain layers in folders, a link for the second of two", async () => {
  const file = fileOf(tarOf(oldDockerSave(plain)));
  const [row] = await list(file);
  assert.deepEqual(
    [row?.name, row?.platform, row?.sizeBytes],
    ["team/app:1.0", "linux/amd64", rowOf(plain, "").sizeBytes],
  );
  assert.deepEqual(
    row?.layers.map(({ size, present }) => [size, present]),
    plain.layers.map(({ bytes }) => [bytes.length, true]),
  );
  assert.match(await passes(file), /: 1 image, .*\nloads in docker/);
  const [untagged] = await list(fileOf(tarOf(oldDockerSave(plain, null))));
  assert.equal(untagged?.name, "");
  const bare = {
    Config: `${hexOf(plain.config.digest)}.json`,
    RepoTags: ["a:1", "b:2"],
    Layers: null,
  };
  const noLayers = makeImage({ layers: [], seed: "scratch" });
  const scratch = fileOf(
    tarOf([
      [`${hexOf(noLayers.config.digest)}.json`, noLayers.configBytes],
      ["manifest.json", json([{ ...bare, Config: `${hexOf(noLayers.config.digest)}.json` }])],
    ]),
  );
  assert.deepEqual(
    (await list(scratch)).map(({ name, layers }) => [name, layers]),
    [["a:1 b:2", []]],
  );
  await passes(scratch);
});

test("a hard link, and links that lead nowhere, in a circle, to a folder or out of the tar", async () => {
  const entries = oldDockerSave(plain);
  const last = entries.findLastIndex(([name]) => name.endsWith("/layer.tar"));
  const [name] = entries[last] as Entry;
  const first = entries.find(([each]) => each.endsWith("/layer.tar"))?.[0] as string;
  const withLink = (content: Entry[1]) => fileOf(tarOf(entries.with(last, [name, content])));
  for (const good of [
    { hardlink: first },
    { hardlink: `./${first}` },
    { symlink: `../${first}` },
  ]) {
    await passes(withLink(good));
  }
  const nowhere: Entry[1][] = [
    { symlink: "../gone/layer.tar" },
    { symlink: "layer.tar" },
    { symlink: first.slice(0, 64) },
    { folder: true },
    { symlink: "../../../../etc/passwd" },
    { symlink: "/etc/passwd" },
    { hardlink: "/etc/passwd" },
  ];
  for (const bad of nowhere) {
    await fails(withLink(bad), `${name} is missing`);
    const rows = await list(withLink(bad));
    assert.deepEqual(
      rows[0]?.layers.map(({ present }) => present),
      [true, true, false],
    );
  }
});

test("OCI archives with and without names; docker save's new form; skopeo's and crane's tars", async () => {
  const nameless = fileOf(tarOf(ociArchive([packed])));
  assert.deepEqual(await list(nameless), [rowOf(packed, "")]);
  assert.doesNotMatch(await passes(nameless), /ctr/); // it imports nothing that has no name
  const annotations = { "org.opencontainers.image.ref.name": "1.0" };
  const named = fileOf(tarOf(ociArchive([packed], { annotations })));
  assert.deepEqual(await list(named), [rowOf(packed, "1.0")]);
  const full = { ...annotations, "io.containerd.image.name": "docker.io/team/app:1.0" };
  const names = plain.layers.map(({ digest }) => blobName(digest));
  const saved = fileOf(
    tarOf([
      ...ociArchive([plain], { annotations: full }),
      [
        "manifest.json",
        json([
          { Config: blobName(plain.config.digest), RepoTags: ["team/app:1.0"], Layers: names },
        ]),
      ],
    ]),
  );
  assert.deepEqual(await list(saved), [rowOf(plain, "docker.io/team/app:1.0")]);
  assert.match(await passes(saved), /: 1 image, 4 blobs .*2 layers .*\nloads in docker.*ctr/);
  const skopeo = fileOf(tarOf(skopeoDockerArchive(plain)));
  assert.deepEqual(await list(skopeo), [rowOf(plain, "docker.io/team/app:1.0", "")]);
  assert.match(await passes(skopeo), /3 blobs .*2 layers/);
  const crane = fileOf(tarOf(craneTar(packed)));
  assert.deepEqual(await list(crane), [rowOf(packed, "team/app:1.0", "")]);
  assert.match(await passes(crane), /3 blobs .*2 layers/);
});

test("an index of which only some platforms are here, as docker save and ctr export make it", async () => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"], { seed: "look-some" });
  const [held, other] = index.children as [TestImage, TestImage];
  const absent = new Set([other.digest, ...other.blobs.keys()].map(blobName));
  const entries = ociArchive([index]);
  const some = fileOf(tarOf(entries.filter(([name]) => !absent.has(name))));
  assert.deepEqual(
    (await list(some)).map(({ digest, platform }) => [digest, platform]),
    [[held.digest, "linux/amd64"]],
  );
  const said = await passes(some);
  assert.match(said, /: 1 image, .*1 of 2 platforms/);
  assert.doesNotMatch(said, /more of an index/);
  const none = entries.filter(([name]) => !absent.has(name) && name !== blobName(held.digest));
  await fails(fileOf(tarOf(none)), `${blobName(index.digest)} names nothing that is here`);
});

const programs =
  spawnSync("skopeo", ["--version"]).status === 0 && spawnSync("crane", ["version"]).status === 0;

test("tars that skopeo and crane themselves make", {
  skip: !programs && "skopeo or crane is not here",
}, async (t) => {
  const layer = makeLayer({ seed: "programs" });
  const image = makeImage({ seed: "programs", layers: [layer, 4096, layer] });
  const layout = join(temporaryFolder(t), "layout");
  for (const [name, content] of ociArchive([image], {
    annotations: { "org.opencontainers.image.ref.name": "1" },
  })) {
    mkdirSync(join(layout, name, ".."), { recursive: true });
    if (Buffer.isBuffer(content) || typeof content === "string")
      writeFileSync(join(layout, name), content);
  }
  for (const kind of ["docker-archive", "oci-archive"]) {
    const file = join(folder, `${kind}.tar`);
    const words = ["--insecure-policy", "copy", `oci:${layout}:1`, `${kind}:${file}:app:1`];
    const { status, stderr } = spawnSync("skopeo", words);
    assert.equal(status, 0, String(stderr));
    assert.equal((await list(file))[0]?.layers.length, 3);
    assert.match(await passes(file), /2 layers/);
  }
  const file = join(folder, "crane.tar");
  // Not spawnSync: the registry is in this process.
  const crane = spawn("crane", ["pull", "--insecure", serve(image, "crane"), file], {
    stdio: "ignore",
  });
  assert.deepEqual(await once(crane, "close"), [0, null]);
  assert.equal((await list(file))[0]?.layers.length, 3);
  assert.match(await passes(file), /2 layers/);
});

/**
 * Node has had zstd since 22.15; before 26 it reads no more than the first frame
 * (nodejs/node#64741).
 */
const hasZstd = "createZstdDecompress" in zlib;
const readsAllFrames = Number(process.versions.node.split(".")[0]) >= 26;

test("zstd layers are unpacked where Node can, and said not to be where it cannot", async () => {
  const image = makeImage({
    seed: "look-zstd",
    layers: [{ compression: "zstd", sizeBytes: 300_000 }, 4096],
  });
  const file = await pull(image, "zstd");
  const said = await passes(file);
  assert.match(said, hasZstd ? /2 layers unpacked: / : /1 layer unpacked, 1 \(zstd\) not/);
  assert.match(said, /loads in docker from 23 on, podman from 4 on/);
  const [row] = await list(file);
  assert.deepEqual(
    row?.layers.map(({ size }) => size),
    [300_000, 4096],
  );
  const tar = readFileSync(file);
  await fails(fileOf(flipped(tar, tar.indexOf("28b52ffd", 0, "hex") + 5000)), /is damaged/);
  const skippable = makeLayer({ seed: "skippable", compression: "zstd" });
  skippable.bytes = Buffer.concat([Buffer.from("502a4d1800000000", "hex"), skippable.bytes]);
  skippable.digest = digestOf(skippable.bytes);
  const archive = fileOf(tarOf(ociArchive([makeImage({ layers: [skippable] })])));
  assert.match(
    await passes(archive),
    readsAllFrames ? /1 layer unpacked: / : /0 layers unpacked, 1 \(zstd\) not/,
  );
  const wrong = makeLayer({ seed: "wrong-zstd", compression: "zstd" });
  wrong.diffId = digestOf("something else");
  const lying = fileOf(tarOf(ociArchive([makeImage({ layers: [wrong] })])));
  // A frame that fills the layer up to its size comes after the one that is read.
  if (hasZstd && readsAllFrames) await fails(lying, /does not unpack to/);
  else assert.match(await passes(lying), /1 \(zstd\) not/);
});

// ====== Damage ======

function flipped(tar: Buffer, at: number): Buffer {
  const copy = Buffer.from(tar);
  copy[at] = (copy[at] as number) ^ 1;
  return copy;
}

test("one flipped bit at the start, middle and end of any blob: exit 1, and the blob is named", async () => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"], { seed: "flip-index" });
  const tars = [
    await pull(makeImage({ seed: "flip", layers: [4096, 90_000] }), "flip"),
    await pull(index, "flip-all", ["--platform", "all"]),
    await pull(makeImage({ seed: "flip-512", algorithm: "sha512" }), "flip-512"),
    await pull(makeOrasArtifact("flip"), "flip-oras"),
    fileOf(tarOf(skopeoDockerArchive(plain))),
    fileOf(tarOf(craneTar(packed))),
    fileOf(tarOf(ociArchive([packed]))),
    fileOf(tarOf(oldDockerSave(plain))),
  ].map((file) => readFileSync(file));
  for (const tar of tars) {
    for (const { name, offset, size } of readTar(tar)) {
      if (
        size < 5 ||
        /(^|\/)(index|manifest|oci-layout|repositories|VERSION|json)(\.json)?$/.test(name)
      )
        continue;
      const hex = /[0-9a-f]{64,}/.exec(name)?.[0] as string;
      for (const at of [0, size >> 1, size - 1]) {
        const said = await fails(fileOf(flipped(tar, offset + at)), hex);
        assert.equal(said.trimEnd().split("\n").length, 1, said);
      }
    }
  }
});

test("two damaged blobs and a missing one are all named", async () => {
  const image = makeImage({ seed: "damages", layers: [4096, 4097, 4098, 4099] });
  const tar = readFileSync(await pull(image, "damages"));
  const [first, second, third, fourth] = image.layers.map(({ digest }) => digest) as [
    string,
    string,
    string,
    string,
  ];
  const entries = [...filesOf(tar)]
    .filter(([name]) => name !== blobName(third))
    .map(
      ([name, bytes]): Entry => [
        name,
        [first, second].map(blobName).includes(name) ? flipped(bytes, 1000) : bytes,
      ],
    );
  const said = await fails(fileOf(tarOf(entries)), hexOf(first), hexOf(second), hexOf(third));
  assert.ok(!said.includes(hexOf(fourth)));
});

test("a flipped bit anywhere in a header: exit 1", async () => {
  const tar = readFileSync(await pull(makeImage({ seed: "flip-header" }), "flip-header"));
  for (const { name, headerOffset } of readTar(tar)) {
    // The checksum's own end (a NUL and a space) is read by nobody.
    for (let at = 0; at < 512; at += 7) {
      if (at !== 154 && at !== 155)
        await fails(fileOf(flipped(tar, headerOffset + at)), /checksum|not a tar/);
    }
    await fails(fileOf(flipped(tar, headerOffset + name.length - 1)));
  }
});

const SAMPLE = makeImage({ seed: "flip-index-json" });

test("a changed digest, size, type or brace in index.json, manifest.json and oci-layout: exit 1", async () => {
  const tar = readFileSync(await pull(SAMPLE, "flip-index-json"));
  const at = (name: string, text: string): number => {
    const { offset = 0, size = 0 } = readTar(tar).find((entry) => entry.name === name) ?? {};
    const position = tar.subarray(offset, offset + size).indexOf(text);
    assert.ok(position >= 0, `${text} in ${name}`);
    return offset + position;
  };
  const hex = hexOf(SAMPLE.digest);
  const config = hexOf(SAMPLE.config.digest);
  const layer = hexOf(SAMPLE.layers[1]?.digest ?? "");
  const places: [name: string, text: string, shift: number][] = [
    ["index.json", hex, 0],
    ["index.json", hex, 63],
    ["index.json", "sha256:", 0],
    ["index.json", "sha256:", 6],
    ["index.json", `"size":`, 7],
    ["index.json", `"size":`, 1],
    ["index.json", `"digest"`, 2],
    ["index.json", `"manifests"`, 3],
    ["index.json", "{", 0],
    ["index.json", "[", 0],
    ["index.json", "manifest.v1+json", 12],
    ["manifest.json", config, 0],
    ["manifest.json", config, 63],
    ["manifest.json", layer, 5],
    ["manifest.json", "blobs/", 2],
    ["manifest.json", `"Config"`, 3],
    ["manifest.json", `"Layers"`, 3],
    ["manifest.json", "[", 0],
    ["manifest.json", "{", 0],
    ["oci-layout", "1.0.0", 0],
    ["oci-layout", "imageLayoutVersion", 0],
    ["oci-layout", "{", 0],
  ];
  for (const [name, text, shift] of places) {
    const said = await fails(fileOf(flipped(tar, at(name, text) + shift)));
    const named = /blobs\/|sha\d|index\.json|manifest\.json|oci-layout|neither/;
    assert.match(said, named, `${name} ${text} ${shift}: ${said}`);
  }
});

test("every byte of index.json: what still passes differs in a name alone", async () => {
  const tar = readFileSync(await pull(SAMPLE, "flip-index-json"));
  const { offset = 0, size = 0 } = readTar(tar).find(({ name }) => name === "index.json") ?? {};
  const index = (bytes: Buffer) => JSON.parse(String(bytes.subarray(offset, offset + size)));
  for (let at = 0; at < size; at += 1) {
    const changed = flipped(tar, offset + at);
    const { exitCode } = await runMain(["--verify", fileOf(changed)]);
    if (exitCode === 1) continue;
    const [entry] = index(changed).manifests;
    const { mediaType, digest, size: sizeBytes } = index(tar).manifests[0];
    assert.deepEqual(
      [exitCode, entry.mediaType, entry.digest, entry.size],
      [0, mediaType, digest, sizeBytes],
    );
  }
});

test("a tar that was cut off, anywhere", async () => {
  const tar = readFileSync(await pull(makeImage({ seed: "cut", layers: [4096, 5000] }), "cut"));
  const lengths = readTar(tar).flatMap(({ headerOffset, offset, size }) => [
    headerOffset,
    headerOffset + 300,
    offset,
    offset + (size >> 1),
    offset + size - 1,
    offset + size,
  ]);
  for (const length of [...lengths, tar.length - 1024]) {
    const file = fileOf(tar);
    truncateSync(file, length);
    const { exitCode, stderr } = await runMain(["--verify", file]);
    assert.equal(exitCode, 1, `${length} of ${tar.length}`);
    const place = new RegExp(`(ends at|cut off at) byte ${length}\\b`);
    assert.match(stderr, length === 0 ? /holds no image/ : place);

    const piped = await runCommand(["--verify", "-"], { stdin: tar.subarray(0, length) });
    assert.equal(piped.exitCode, 1);
    assert.equal(piped.stderr, stderr.replaceAll(`${file}:`, "-:"));
  }
});

test("a pull's partial: what is not there yet is named, as what it is", async () => {
  const image = makeImage({ seed: "partial", layers: [4096, 5000] });
  const tar = readFileSync(await pull(image, "partial"));
  const names = [image.config, ...image.layers].map(({ digest }) => blobName(digest));
  const partial = `${fileOf(tar)}.partial`;
  for (const { name, offset, size } of readTar(tar))
    if (names.includes(name)) tar.fill(0, offset, offset + size);
  writeFileSync(partial, tar);

  const hint =
    /\.partial: it is what a pull keeps until it is whole: the same command goes on with it\n$/;
  const said = await fails(partial, ...names.map((name) => `${name} is damaged\n`), hint);
  assert.equal(said.split("\n").length, names.length + 2);
  const { exitCode, stderr } = await runMain(["--list-tar", partial]);
  assert.equal(exitCode, 1);
  assert.ok(stderr.startsWith(`imgpull: ${partial}: ${names[0]} is not JSON`), stderr);
  assert.match(stderr, hint);
});

test("what is wrong is said with its place: a header, what a header says, the end", async () => {
  const entries = ociArchive([makeImage({ seed: "places" })]);
  const tar = tarOf(entries);
  const [, , third] = readTar(tar);
  const at = third?.headerOffset ?? 0;
  const badSum = flipped(tar, at + 20);
  const badTime = tarOf([
    ["first", "x"],
    ["second", { raw: rawEntry({ name: "second", pax: { mtime: "soon" } }) }],
  ]);
  const goesOn = Buffer.concat([tar.subarray(0, -512), tar.subarray(0, 512)]);
  const cases: [Buffer, RegExp][] = [
    [badSum, new RegExp(`a header's checksum\\), at byte ${at}\\n`)],
    [badTime, /a pax record is malformed, at byte 1536\n/],
    [
      goesOn,
      new RegExp(`goes on after the block of zeros that ends it, at byte ${tar.length - 512}\\n`),
    ],
    [tar.subarray(0, at + 3), new RegExp(`ends at byte ${at + 3}, in the middle of a header`)],
    [tar.subarray(0, -1024), new RegExp(`cut off at byte ${tar.length - 1024}\\n`)],
    [Buffer.from("no tar".repeat(99)), /not a tar.*, at byte 0\n/],
  ];
  for (const [bytes, says] of cases) {
    await fails(fileOf(bytes), says);
    await fails(fileOf(zlib.gzipSync(bytes)), says);
  }
  const layer = third?.name ?? "";
  const within = tar.subarray(0, (third?.offset ?? 0) + 5);
  await fails(fileOf(within), `in the middle of ${layer}: it was cut off`);
});

test("any entry taken out: exit 1, and it is named", async () => {
  const image = makeImage({ seed: "gone" });
  const files = filesOf(readFileSync(await pull(image, "gone")));
  for (const gone of [...files.keys()].filter((name) => name.startsWith("blobs/"))) {
    const file = fileOf(tarOf([...files].filter(([name]) => name !== gone)));
    await fails(file, `${gone} is missing`);
    const { exitCode, stdout, stderr } = await runMain(["--list-tar", file]);
    const isManifest = gone === blobName(image.digest);
    assert.equal(exitCode, isManifest ? 1 : 0, stderr);
    assert.ok(
      isManifest ? stderr.includes(`${gone} is missing`) : String(stdout).includes(image.digest),
    );
  }
  const bare = fileOf(
    tarOf([...files].filter(([name]) => name !== "index.json" && name !== "manifest.json")),
  );
  await fails(bare, /no image.*index\.json.*manifest\.json/);
  assert.equal((await runMain(["-l", bare])).exitCode, 1);
});

const withIds = (ids: unknown) =>
  makeImage({
    seed: "ids",
    editConfig: (config) => ({ ...config, rootfs: { type: "layers", diff_ids: ids } }),
  });

test("layers that are not what the config's diff_ids say", async () => {
  const { layers } = withIds([]);
  const ids = layers.map(({ diffId }) => diffId) as [string, string];
  const firstName = blobName(layers[0]?.digest ?? "");
  await passes(fileOf(tarOf(ociArchive([withIds(ids)]))));
  await fails(
    fileOf(tarOf(ociArchive([withIds([digestOf("another"), ids[1]])]))),
    firstName,
    digestOf("another"),
  );
  await fails(fileOf(tarOf(ociArchive([withIds(ids.toReversed())]))), firstName);
  for (const bad of [[ids[0]], [...ids, ids[0]], [], ["x", ids[1]], [null, ids[1]], [{}, ids[1]]]) {
    await fails(fileOf(tarOf(ociArchive([withIds(bad)]))), /diff_id/);
  }
  const old = oldDockerSave(plain).map(
    ([name, content]): Entry => [
      name,
      Buffer.isBuffer(content) && name.endsWith("layer.tar") ? flipped(content, 600) : content,
    ],
  );
  await fails(fileOf(tarOf(old)), "layer.tar", plain.layers[0]?.diffId ?? "");
  const junk = makeLayer({ seed: "junk" });
  junk.bytes = Buffer.concat([junk.bytes.subarray(0, 3000), pseudoRandom("junk", 500)]);
  junk.digest = digestOf(junk.bytes);
  await fails(
    fileOf(tarOf(ociArchive([makeImage({ layers: [junk] })]))),
    blobName(junk.digest),
    junk.diffId,
  );
});

test("sizes that manifests and indexes state, and types that they name", async () => {
  const smaller = makeImage({
    seed: "sizes",
    editManifest: (manifest) => ({
      ...manifest,
      layers: manifest.layers.map((layer) => ({ ...layer, size: layer.size - 1 })),
    }),
  });
  const layer = blobName(smaller.layers[0]?.digest ?? "");
  await fails(fileOf(tarOf(ociArchive([smaller]))), `${layer} has 8192 bytes, not 8191`);
  await fails(fileOf(tarOf(ociArchive([packed], { size: 5 }))), blobName(packed.digest), /not 5/);
  await fails(
    fileOf(tarOf(ociArchive([packed], { mediaType: MEDIA.dockerManifest }))),
    packed.digest.slice(7),
  );
  const child = makeIndex([{ content: packed, fields: { size: 7 } }]);
  await fails(fileOf(tarOf(ociArchive([child]))), blobName(packed.digest), /not 7/);
});

test("two files of one name: programs differ in which they take, so neither is believed", async () => {
  const entries = ociArchive([packed]);
  for (const name of [blobName(packed.layers[0]?.digest ?? ""), "index.json"]) {
    const [, content] = entries.find(([each]) => each === name) as Entry;
    const other: Entry = [name, Buffer.isBuffer(content) ? flipped(content, 20) : "{}"];
    for (const doubled of [
      [other, ...entries],
      [...entries, other],
    ]) {
      await fails(fileOf(tarOf(doubled)), `two entries are called ${name}`);
    }
  }
  await passes(fileOf(tarOf([["blobs/", { folder: true }], ...entries]))); // folders may be said twice
});

test("a second list under a name that loaders resolve to the same, or through a link: refused", async () => {
  const image = makeImage({ seed: "second list" });
  const entries = ociArchive([image], {
    annotations: { "io.containerd.image.name": "docker.io/team/app:1" },
  });
  const list: Entry = [
    "manifest.json",
    json([
      {
        Config: blobName(image.config.digest),
        RepoTags: ["docker.io/team/app:1"],
        Layers: image.layers.map(({ digest }) => blobName(digest)),
      },
    ]),
  ];
  const whole = [...entries, list];
  await passes(fileOf(tarOf(whole)));
  const evil = "[]";
  const spelled = ["/N", "./N", "././N", ".//N", "//N", "N/."];
  for (const document of ["manifest.json", "index.json"]) {
    const seconds: [why: RegExp, entries: Entry[]][] = [
      ...spelled.map((name): [RegExp, Entry[]] => [
        new RegExp(`two entries are called ${document}`),
        [[name.replace("N", document), evil]],
      ]),
      [
        /two entries are called/,
        [
          ["other", evil],
          [document, { hardlink: "other" }],
        ],
      ],
      [
        /two entries are called/,
        [
          ["other", evil],
          [document, { symlink: "other" }],
        ],
      ],
      [/two entries are called/, [[document, { folder: true }]]],
      [/leads through \.\./, [[`x/../${document}`, evil]]],
      [/leads through \.\./, [[`blobs/../${document}`, evil]]],
      [
        /lies below something that is no folder/,
        [
          ["x", { symlink: "." }],
          [`x/${document}`, evil],
        ],
      ],
      [
        /lies below something that is no folder/,
        [
          ["x", { hardlink: "oci-layout" }],
          [`x/${document}`, evil],
        ],
      ],
    ];
    for (const [why, second] of seconds)
      for (const tar of [
        [...second, ...whole],
        [...whole, ...second],
      ])
        await fails(fileOf(tarOf(tar)), why);
  }
});

test("an image whose config names no layers at all", async () => {
  const without = makeImage({
    seed: "no-rootfs",
    editConfig: ({ rootfs: _rootfs, ...config }) => config,
  });
  await fails(fileOf(tarOf(ociArchive([without]))), /not one diff_id for each layer/);
});

test("which loaders take it: a name for skopeo where there are several images, one image for podman without a list", async () => {
  const many = await pullWith([serve(packed, "many-a"), serve(plain, "many-b")]);
  assert.match(await passes(many), /skopeo docker-archive:FILE:NAME, skopeo oci-archive:FILE:NAME/);
  const bare = await passes(fileOf(tarOf(ociArchive([packed, plain]))));
  assert.doesNotMatch(bare, /podman|docker/);
  assert.match(await passes(fileOf(tarOf(ociArchive([packed])))), /podman.*oci-archive:FILE\n/);
});

/** Layers of which test/interop-verify.test.ts has more, and asks the loaders themselves. */
test("a layer with a path that some loaders do not unpack: they are not named, and the path is", async () => {
  const file = (name: string): RawEntry => ({ name, content: "x" });
  const hard = (name: string, link: string): RawEntry => ({ name, type: "1", link });
  const cases: [entries: RawEntry[], path: string, loadsInCtr: boolean][] = [
    [[file("etc/x"), file("./etc/x")], "./etc/x", true],
    [[{ name: "a", type: "2", link: "no" }, file("a/b")], "a/b", true],
    [[file("a"), file("a/b")], "a/b", false],
    [[hard("b", "a"), file("a")], "b", false],
    [[file("a"), file(".wh.")], ".wh.", false],
    [[file("a"), file("a"), hard("b", "no")], "b", false],
    [[{ ...file("a"), pax: { "SCHILY.xattr.user.x": "y".repeat(5000) } }], "a", false],
  ];
  for (const [entries, oddPath, loadsInCtr] of cases) {
    const content = rawTar(...entries);
    const layer = {
      ...makeLayer({ mediaType: MEDIA.ociTar }),
      bytes: content,
      digest: digestOf(content),
      diffId: digestOf(content),
    };
    const image = makeImage({ layers: [layer] });
    const annotations = { "io.containerd.image.name": "docker.io/team/app:1" };
    const said = await passes(fileOf(tarOf(ociArchive([image], { annotations }))));
    const loads = [...(loadsInCtr ? ["ctr"] : []), "skopeo oci-archive:FILE"].join(", ");
    assert.ok(said.includes(`\nloads in ${loads}\n`), said);
    const words = loadsInCtr
      ? "makes one of its paths twice, or where nothing is"
      : "has a path that cannot be unpacked";
    assert.ok(said.includes(`not in podman: ${blobName(layer.digest)} ${words}: ${oddPath}`), said);
  }
});

// ====== What is no tar, and what is meant to harm ======

test("what is not a tar, is not there, is a folder, is too large", async () => {
  const gone = join(folder, "no-such.tar");
  for (const how of ["--list-tar", "--verify"]) {
    for (const [file, says] of [
      [gone, /no such file/],
      [folder, /no image/],
      ["/dev/null", /no image/],
      [fileOf(Buffer.from("x".repeat(5000))), /not a tar/],
      [fileOf(zlib.gzipSync(Buffer.alloc(5000, "x"))), /not a tar/],
      [fileOf(Buffer.from("fd377a585a000004", "hex")), /compressed \(xz\)/],
      [fileOf(Buffer.alloc(0)), /no image/],
      [fileOf(Buffer.alloc(2048)), /no image/],
      [fileOf(Buffer.alloc(100)), /middle of a header/],
      [
        fileOf(tarOf([["index.json", Buffer.alloc(17 * 1024 * 1024, " ")]])),
        /index\.json is too large/,
      ],
    ] as const) {
      const { exitCode, stdout, stderr } = await runMain([how, file]);
      assert.deepEqual([exitCode, String(stdout)], [1, ""], `${how} ${file}: ${stderr}`);
      assert.match(stderr, says);
      assert.match(stderr, /^imgpull: .*\n$/);
    }
  }
});

test("--list-tar and --verify go with no IMAGE and not with each other", async () => {
  for (const [words, says] of [
    ["-l a.tar alpine", /--list-tar takes one tar/],
    ["--verify a.tar alpine", /--verify takes one tar/],
    ["-l a.tar --verify a.tar", /--list-tar.*--verify/],
  ] as const) {
    const { exitCode, stderr } = await runMain(words.split(" "));
    assert.equal(exitCode, 2, stderr);
    assert.match(stderr, says);
  }
});

const entriesOf = (config: unknown, manifest: unknown, layer = "layer"): Entry[] => [
  ["c.json", json(config)],
  ["l", layer],
  ["manifest.json", json(manifest)],
];

/** Each is refused or read, in bounded time, without a stack trace. */
const ODD: [name: string, entries: Entry[]][] = [
  ...[
    null,
    5,
    "x",
    {},
    [null],
    [5],
    ["x"],
    [{}],
    [{ Config: 5, Layers: [] }],
    [{ Config: "c.json", Layers: "l" }],
    [{ Config: "c.json", Layers: [5] }],
    [{ Config: "c.json", Layers: ["l"], RepoTags: "x" }],
    [{ Config: "c.json", Layers: ["l"], RepoTags: [5] }],
    [{ Config: "c.json", Layers: ["l"], RepoTags: {} }],
    [{ Layers: ["l"] }],
    [{ Config: "", Layers: [""] }],
    [{ Config: "__proto__", Layers: ["constructor"] }],
    [],
  ].map((manifest): [string, Entry[]] => [
    `manifest.json ${json(manifest)}`,
    entriesOf({}, manifest),
  ]),
  ...[
    null,
    5,
    [],
    "x",
    { rootfs: 5 },
    { rootfs: null },
    { rootfs: { diff_ids: 5 } },
    { rootfs: { diff_ids: null } },
    { rootfs: { diff_ids: { 0: "x" } } },
    { rootfs: { diff_ids: "x" } },
    { os: 5, architecture: {}, variant: [] },
  ].map((config): [string, Entry[]] => [
    `config ${json(config)}`,
    entriesOf(config, [{ Config: "c.json", Layers: ["l"] }]),
  ]),
  ...[
    null,
    5,
    "x",
    [],
    {},
    { manifests: {} },
    { manifests: [null] },
    { manifests: [5] },
    { manifests: [{}] },
    { manifests: [] },
    { manifests: [{ digest: "sha256:x", size: 1 }] },
    { manifests: [{ digest: packed.digest, size: -1 }] },
  ].map((index): [string, Entry[]] => [`index.json ${json(index)}`, [["index.json", json(index)]]]),
  ...[
    5,
    null,
    {},
    "x",
    { "io.containerd.image.name": 5 },
    { "io.containerd.image.name": {} },
    { "org.opencontainers.image.ref.name": { toString: 1 } },
    { "io.containerd.image.name": [{ toString: 1 }] },
  ].map((annotations): [string, Entry[]] => [
    `annotations ${json(annotations)}`,
    ociArchive([packed], { annotations }),
  ]),
  ["a manifest that is none", ociArchive([makeManifest(MEDIA.ociManifest, "text")])],
  ["a manifest of schema 1", ociArchive([makeManifest(MEDIA.dockerSchema1, { schemaVersion: 1 })])],
  [
    "a manifest that is two things",
    ociArchive([
      makeManifest(MEDIA.ociManifest, { config: packed.config, layers: [], manifests: [] }),
    ]),
  ],
  [
    "a folder in a config's place",
    [
      ["c.json", { folder: true }],
      ["manifest.json", json([{ Config: "c.json", Layers: [] }])],
    ],
  ],
  [
    "folders in the place of everything",
    [
      ["index.json", { folder: true }],
      ["manifest.json", { folder: true }],
    ],
  ],
];

test("odd values in every place: a line that says so, never a stack trace", async () => {
  for (const [name, entries] of ODD) {
    const file = fileOf(tarOf(entries));
    for (const args of [
      ["-l", file],
      ["--verify", file],
    ]) {
      const { exitCode, stderr } = await runMain(args).catch((error: unknown) =>
        assert.fail(`${name}: ${(error as Error).stack}`),
      );
      assert.ok(exitCode === 0 || exitCode === 1, name);
      assert.equal(exitCode, stderr === "" ? 0 : 1, name);
      assert.doesNotMatch(stderr, /\[object/, name);
    }
  }
});

test("indexes that contain themselves or each other many times over end soon", async () => {
  const digest = digestOf("an index that claims to be itself");
  const entry = { mediaType: MEDIA.ociIndex, digest, size: 10 };
  const index = (count: number) =>
    json({ schemaVersion: 2, mediaType: MEDIA.ociIndex, manifests: Array(count).fill(entry) });
  await fails(
    fileOf(
      tarOf([
        ["index.json", index(1)],
        [blobName(digest), index(1000)],
      ]),
    ),
    hexOf(digest),
  );
  const loop = await runMain([
    "-l",
    fileOf(
      tarOf([
        ["index.json", index(1)],
        [blobName(digest), index(1000)],
      ]),
    ),
  ]);
  assert.ok(loop.exitCode === 0 || loop.exitCode === 1);
  let nested: TestContent = packed;
  for (let depth = 0; depth < 7; depth += 1) {
    nested = makeIndex([
      nested,
      makeIndex([nested], { editIndex: (each) => ({ ...each, depth }) }),
    ]);
  }
  await fails(fileOf(tarOf(ociArchive([nested]))), /deep/);
});

const EVIL = "a\u001b[2J\u001b]0;owned\u0007\r\nimgpull: all is right\u009b31m\u202etxt\u2066b";

test("names with control characters are printed harmlessly, on a terminal and in errors", async () => {
  const evil = (content: TestContent) =>
    ociArchive([content], {
      annotations: { "io.containerd.image.name": EVIL },
      platform: { os: EVIL, architecture: EVIL },
    });
  const platform = makeImage({
    editConfig: (config) => ({ ...config, os: EVIL, architecture: EVIL, variant: EVIL }),
  });
  const config = {
    os: EVIL,
    architecture: EVIL,
    rootfs: { diff_ids: [EVIL, digestOf("x"), EVIL] },
  };
  const cases: Entry[][] = [
    evil(packed),
    evil(platform),
    evil(withIds([EVIL, EVIL])),
    evil(makeIndex([packed])),
    evil(packed).slice(3),
    evil(makeImage({ layers: [makeLayer({ mediaType: EVIL })] })),
    ociArchive([packed], { mediaType: EVIL }),
    ociArchive([packed], { digest: EVIL }),
    ociArchive([packed], { size: EVIL }),
    evil(makeManifest(EVIL, EVIL)),
    [
      [EVIL, json(config)],
      ["l", "l"],
      ["manifest.json", json([{ Config: EVIL, RepoTags: [EVIL, EVIL], Layers: ["l", EVIL, "l"] }])],
    ],
    [
      ["c", json(config)],
      [EVIL, "l"],
      ["manifest.json", json([{ Config: "c", RepoTags: [EVIL], Layers: [EVIL, "gone", EVIL] }])],
    ],
    [
      [EVIL, "{"],
      ["manifest.json", json([{ Config: EVIL, RepoTags: [], Layers: [] }])],
    ],
    [
      [EVIL, Buffer.alloc(17 * 1024 * 1024)],
      ["manifest.json", json([{ Config: EVIL, RepoTags: [], Layers: [] }])],
    ],
    [["index.json", EVIL]],
    [["manifest.json", EVIL]],
    [["oci-layout", json(EVIL)], ...ociArchive([packed]).slice(0, -1)],
  ];
  for (const [at, entries] of cases.entries()) {
    const file = fileOf(tarOf(entries));
    for (const [args, columns] of [
      [["-l", file], 80],
      [["-l", file]],
      [["--verify", file, "--quiet"], 80], // progress moves the cursor, as it should
    ] as const) {
      const { exitCode, stdout, stderr } = await runMain(
        [...args],
        columns ? { terminalColumns: columns } : {},
      );
      assert.ok(exitCode === 0 || exitCode === 1, `case ${at}`);
      assertHarmless(String(stdout) + stderr);
      assert.doesNotMatch(String(stdout) + stderr, /^imgpull: all is right/m);
      if (exitCode === 1) assert.match(stderr, /^imgpull: /);
    }
  }
});

test("an attestation's layers are checked where its config has diff_ids, and left alone where not", async () => {
  const index = makeIndex([packed, makeAttestation(packed)]);
  await passes(fileOf(tarOf(ociArchive([index]))));
});

// ====== From a pipe, through compression, as a folder ======

const HAS_ZSTD = hasZstd && "zstdCompressSync" in zlib;
const zstd = (bytes: Buffer): Buffer =>
  (zlib as unknown as { zstdCompressSync: (bytes: Buffer) => Buffer }).zstdCompressSync(bytes);

/** The same image in every form: as pulled, packed, as a folder of its files. */
/**
 * What each form has to be said of: what is compressed as a whole ctr and docker-archive do not
 * take.
 */
type Form = Readonly<{ bytes: Buffer; loads: string }>;

const GZIP_LOADS = `loads in docker, podman, skopeo oci-archive:FILE
not in ctr: the tar is compressed as a whole
not in skopeo docker-archive: the tar is compressed as a whole`;
const ZSTD_LOADS = `loads in podman, skopeo docker-archive:FILE, skopeo oci-archive:FILE
not in docker: the tar is compressed as a whole
not in ctr: the tar is compressed as a whole`;
const FOLDER_LOADS = "loads in podman, skopeo oci:FOLDER";
const CAPITALS_LOADS = (folder: string) => `loads in skopeo oci:FOLDER
not in podman: ${folder} is a path that no image can be called after`;

async function formsOf(image: TestImage, tag: string) {
  const tar = readFileSync(await pull(image, tag));
  const folderForm = join(tmpdir(), `imgpull-layout-${process.pid}`, tag); // all in small letters
  scope.after(() => rmSync(join(folderForm, ".."), { recursive: true, force: true }));
  for (const [name, bytes] of filesOf(tar)) {
    mkdirSync(join(folderForm, name, ".."), { recursive: true });
    writeFileSync(join(folderForm, name), bytes);
  }
  const packed: Form[] = [{ bytes: zlib.gzipSync(tar), loads: GZIP_LOADS }];
  if (HAS_ZSTD) packed.push({ bytes: zstd(tar), loads: ZSTD_LOADS });
  return { tar, packed, folderForm };
}

test("through gzip and zstd, from stdin, as a folder, from a pipe with a name: the same count, and its own loaders", async () => {
  const image = makeImage({ seed: "forms", layers: [4096, 700_000] });
  const { tar, packed, folderForm } = await formsOf(image, "forms");
  const plain = (await passes(fileOf(tar))).replace(/^.*?: /, "");
  const [counts, loads = ""] = plain.trimEnd().split(/\n(?=loads in )/);
  const rows = await list(fileOf(tar));

  assert.equal((await passes(folderForm)).replace(/^.*?: /, ""), `${counts}\n${FOLDER_LOADS}\n`);
  const capitals = join(folderForm, "..", "Layout");
  cpSync(folderForm, capitals, { recursive: true });
  const ofCapitals = `${counts}\n${CAPITALS_LOADS(capitals)}\n`;
  assert.equal((await passes(capitals)).replace(/^.*?: /, ""), ofCapitals);
  assert.deepEqual(await list(folderForm), rows);
  const pipe = join(temporaryFolder(scope), "pipe");
  assert.equal(spawnSync("mkfifo", [pipe]).status, 0);
  for (const form of [{ bytes: tar, loads }, ...packed]) {
    const expected = `${counts}\n${form.loads}\n`;
    assert.equal((await passes(fileOf(form.bytes))).replace(/^.*?: /, ""), expected);
    assert.deepEqual(await list(fileOf(form.bytes)), rows);

    const verified = await runCommand(["--verify", "-"], { stdin: form.bytes });
    assert.deepEqual(
      [verified.exitCode, verified.stderr, String(verified.stdout)],
      [0, "", `-: ${expected}`],
    );
    const listed = await runCommand(["--list-tar", "-"], { stdin: form.bytes });
    assert.deepEqual(JSON.parse(String(listed.stdout)), rows[0]);

    const writer = spawn("sh", ["-c", 'cat >"$0"', pipe], {
      stdio: ["pipe", "inherit", "inherit"],
    });
    const closed = once(writer, "close");
    writer.stdin.end(form.bytes);
    assert.equal((await passes(pipe)).replace(/^.*?: /, ""), expected);
    await closed;
  }
});

test("damage in a pipe, in a folder and in compressed tars is found", async () => {
  const image = makeImage({ seed: "forms-damage", layers: [4096, 90_000] });
  const { tar, packed, folderForm } = await formsOf(image, "forms-damage");
  const files = [...packed.map(({ bytes }) => fileOf(bytes)), folderForm];
  const at = tar.indexOf(image.layers[1]?.bytes.subarray(0, 64) ?? "") + 40_000;
  const name = blobName(image.layers[1]?.digest ?? "");
  const damaged = flipped(tar, at);
  const verified = await runCommand(["--verify", "-"], { stdin: damaged });
  assert.deepEqual([verified.exitCode, verified.stderr], [1, `imgpull: -: ${name} is damaged\n`]);
  await fails(fileOf(zlib.gzipSync(damaged)), `${name} is damaged`);
  await fails(fileOf(flipped(zlib.gzipSync(tar), 50_000)), /damaged/);
  await fails(fileOf(zlib.gzipSync(tar).subarray(0, -300)), /cut off/);
  for (const cut of [300, 512 + 40, tar.length >> 1, tar.length - 1024]) {
    const { exitCode, stderr } = await runCommand(["--verify", "-"], {
      stdin: tar.subarray(0, cut),
    });
    assert.equal(exitCode, 1);
    assert.match(stderr, /cut off|middle of/);
  }
  const layout = files.at(-1) as string;
  writeFileSync(join(layout, name), flipped(readFileSync(join(layout, name)), 5));
  await fails(layout, `${name} is damaged`);
  rmSync(join(layout, name));
  await fails(layout, `${name} is missing`);
});

/**
 * The exit code after Ctrl-C. Nothing tells when it listens for that: one that does not yet is
 * started anew.
 */
async function exitCodeAfterInterrupt(args: string[], stdin?: Buffer): Promise<number | null> {
  for (const waitMs of [300, 2000, 10_000]) {
    const { child, result } = startCommand(args, stdin ? { stdin: "open" } : {});
    if (stdin) child.stdin?.write(stdin);
    await delay(waitMs);
    child.kill("SIGINT");
    const { exitCode, signal } = await result;
    if (signal === null) return exitCode;
  }
  return null;
}

test("a pipe that nobody writes into, or that goes quiet: Ctrl-C ends it at once", async (t) => {
  const pipe = join(temporaryFolder(t), "pipe");
  assert.equal(spawnSync("mkfifo", [pipe]).status, 0);
  assert.equal(await exitCodeAfterInterrupt(["--verify", pipe]), 130);

  const beginning = readFileSync(await pull(packed, "quiet")).subarray(0, 5000);
  for (const option of ["--verify", "--list-tar"])
    assert.equal(await exitCodeAfterInterrupt([option, "-"], beginning), 130, option);
});

test("a wait for a pipe's writer ends, whenever it is stopped", { timeout: 20_000 }, async (t) => {
  const pipe = join(temporaryFolder(t), "pipe");
  assert.equal(spawnSync("mkfifo", [pipe]).status, 0);
  for (let turns = 0; turns < 12; turns += 1) {
    const stop = new AbortController();
    const looking = verifyTar(pipe, { signal: stop.signal });
    looking.catch(() => {});
    for (let turn = 0; turn < turns; turn += 1) await new Promise(setImmediate);
    stop.abort();
    await assert.rejects(looking, { code: "ABORTED" }, `after ${turns} turns`);
  }
});

// ====== What cannot be unpacked, or without end ======

test("encrypted, xz and bzip2 layers are counted, not called wrong", async () => {
  const layerOf = (mediaType: string, bytes: Buffer): TestLayer => ({
    ...makeLayer({ seed: mediaType, mediaType }),
    bytes,
    digest: digestOf(bytes),
  });
  const plainType = "application/vnd.oci.image.layer.v1.tar";
  const cases: [reason: string, layer: TestLayer][] = [
    ["encrypted", layerOf(`${MEDIA.ociGzip}+encrypted`, pseudoRandom("secret", 5000))],
    ["encrypted", layerOf(`${plainType}+encrypted`, pseudoRandom("secret too", 5000))],
    [
      "xz",
      layerOf(
        `${plainType}`,
        Buffer.concat([Buffer.from("fd377a585a0000", "hex"), pseudoRandom("xz", 999)]),
      ),
    ],
    [
      "bzip2",
      layerOf(plainType, Buffer.concat([Buffer.from("BZh91AY&SY"), pseudoRandom("bzip2", 999)])),
    ],
  ];
  for (const [reason, layer] of cases) {
    const image = makeImage({ seed: reason, layers: [layer, 4096] });
    assert.match(
      await passes(fileOf(tarOf(ociArchive([image])))),
      new RegExp(`1 layer unpacked, 1 \\(${reason}\\) not`),
    );
  }
  // Without the word for it, bytes that do not unpack are wrong.
  const mute = makeImage({ layers: [layerOf(MEDIA.ociGzip, pseudoRandom("secret", 5000))] });
  await fails(fileOf(tarOf(ociArchive([mute]))), /does not unpack/);
});

/** Zeros are left out, so that the file system has holes in their place. */
function writeWithHoles(file: string, bytes: Buffer): void {
  const handle = openSync(file, "w");
  ftruncateSync(handle, bytes.length);
  for (let at = 0; at < bytes.length; at += 4096) {
    const piece = bytes.subarray(at, at + 4096);
    if (piece.some((byte) => byte !== 0)) writeSync(handle, piece, 0, piece.length, at);
  }
  closeSync(handle);
}

test("files with holes, as bsdtar and GNU tar -S write them, are read as what they are", async (t) => {
  const isGnuTar = /GNU tar/.test(String(spawnSync("tar", ["--version"]).stdout));
  if (!isGnuTar) return t.skip("GNU tar is not here");
  const holed = makeLayer({
    seed: "holes",
    compression: "none",
    sizeBytes: 900_096,
    files: { "data/zeros": Buffer.alloc(800_000) },
  });
  const image = makeImage({ seed: "holes", layers: [holed] });
  const cwd = temporaryFolder(t);
  for (const [name, content] of ociArchive([image])) {
    mkdirSync(join(cwd, name, ".."), { recursive: true });
    if (typeof content === "string") writeFileSync(join(cwd, name), content);
    if (Buffer.isBuffer(content)) writeWithHoles(join(cwd, name), content);
  }
  const forms = [["gnu"], ["pax", "0.0"], ["pax", "0.1"], ["pax", "1.0"]];
  for (const [format, version] of forms) {
    const flags = [`--format=${format}`, "--hole-detection=raw"];
    if (version) flags.push(`--sparse-version=${version}`);
    const words = ["-cSf", "-", ...flags, "oci-layout", "index.json", "blobs"];
    const { stdout, status } = spawnSync("tar", words, { cwd });
    assert.equal(status, 0);
    assert.ok(stdout.length < 400_000, "it has holes");
    assert.match(await passes(fileOf(stdout)), /3 blobs hashed, 1 layer unpacked/, flags.join(" "));
    const piped = await runCommand(["--verify", "-"], { stdin: stdout });
    assert.deepEqual([piped.exitCode, piped.stderr], [0, ""], flags.join(" "));
    const [row] = await list(fileOf(stdout));
    assert.deepEqual(row, rowOf(image, ""));
    const at = stdout.indexOf(holed.bytes.subarray(0, 512));
    await fails(fileOf(flipped(stdout, at + 100)), `${blobName(holed.digest)} is damaged`);
  }
});

test("what unpacks without end is refused by name, soon", async () => {
  // deflate cannot make less than a thousandth; holes and zstd can.
  const isGnuTar = /GNU tar/.test(String(spawnSync("tar", ["--version"]).stdout));
  const cwd = temporaryFolder(scope);
  const hole = join(cwd, "blobs/sha256", "0".repeat(64));
  mkdirSync(join(hole, ".."), { recursive: true });
  writeFileSync(hole, "x");
  truncateSync(hole, 2 ** 41);
  for (const format of isGnuTar ? ["gnu", "pax"] : []) {
    const { stdout } = spawnSync("tar", ["-cSf", "-", `--format=${format}`, "blobs"], { cwd });
    await fails(fileOf(stdout), "0".repeat(64), /unpacks to more than 1000 times its size/);
  }
  if (!HAS_ZSTD) return;
  const layer = makeLayer({ seed: "bomb" });
  layer.bytes = zstd(Buffer.alloc(1.5 * 2 ** 30));
  layer.digest = digestOf(layer.bytes);
  const bomb = fileOf(tarOf(ociArchive([makeImage({ layers: [layer] })])));
  await fails(bomb, blobName(layer.digest), /unpacks to more than 1000 times its size/);
});

test("what Go reads otherwise than GNU's tar, or not at all, is refused", async () => {
  const image = makeImage({ seed: "otherwise" });
  const entries = ociArchive([image]);
  const rest = entries.filter(([name]) => name !== "index.json");
  const [, index] = entries.find(([name]) => name === "index.json") as Entry;
  const evil = '{"schemaVersion":2,"manifests":[]}';
  const named = (name: string, content: string, pax: Record<string, string>): Entry => [
    name,
    { raw: rawEntry({ name, content, pax }) },
  ];
  const good = { name: "a", content: String(index) };
  const indexBytes = String(index.toString().length);
  const sparse = (records: Record<string, string>): Entry =>
    named("index.json", String(index), { "GNU.sparse.name": "index.json", ...records });
  const whole = { "GNU.sparse.size": indexBytes, "GNU.sparse.map": `0,${indexBytes}` };
  await passes(fileOf(tarOf([...rest, sparse({ ...whole, "GNU.sparse.numblocks": "1" })])));

  const field = (at: number, text: string): Entry => [
    "index.json",
    {
      raw: rawEntry({
        ...good,
        name: "index.json",
        edit: (header) => {
          header.write("ustar  \0", 257);
          header.write(text, at);
        },
      }),
    },
  ];
  await passes(fileOf(tarOf([...rest, field(345, "00000000000\0")])));
  const cases: Record<string, Entry[]> = {
    "a sparse file's name without a map": [
      named("aside", String(index), { "GNU.sparse.name": "index.json" }),
      named("index.json", evil, { "GNU.sparse.name": "other" }),
    ],
    "a form of sparse files that is not known": [
      sparse({ ...whole, "GNU.sparse.major": "1", "GNU.sparse.minor": "1" }),
    ],
    "another count of pieces": [sparse({ ...whole, "GNU.sparse.numblocks": "2" })],
    "a map in hexadecimal digits": [
      sparse({ ...whole, "GNU.sparse.map": "0x0,0x5", "GNU.sparse.numblocks": "1" }),
    ],
    "a map of less than is stored": [
      sparse({ ...whole, "GNU.sparse.map": "0,5", "GNU.sparse.numblocks": "1" }),
    ],
    "a time of GNU's that Go takes for a part of the name": [field(345, "aside\0")],
    "the other time": [field(357, "aside\0")],
    "a time that is none": [named("index.json", String(index), { mtime: "soon" })],
    "a key with NUL": [named("index.json", String(index), { "a\0b": "c" })],
  };
  for (const [name, odd] of Object.entries(cases))
    for (const how of ["--verify", "--list-tar"]) {
      const { exitCode, stderr } = await runMain([how, fileOf(tarOf([...rest, ...odd]))]);
      assert.equal(exitCode, 1, name);
      assert.match(stderr, /sparse file|not octal|pax record is malformed/, name);
    }
});

// ====== Bounds ======

/**
 * Says at its end how much memory the command had: maxRSS begins with what the process had that
 * forked it. The binaries take no options of Node's.
 */
const TELL_MEMORY = `process.on("exit", () => {
  const { readFileSync, writeSync } = require("node:fs");
  const status = process.platform === "linux" ? String(readFileSync("/proc/self/status")) : "";
  const [, peak = process.resourceUsage().maxRSS] = /VmHWM:\\s+(\\d+)/.exec(status) ?? [];
  writeSync(2, "peak " + peak + " KiB\\n");
});
`;

/** Old GNU's sparse file: one hole. */
const holeEntry = (name: string, bytes: number): Buffer =>
  rawEntry({
    name,
    type: "S",
    edit: (header) => {
      const size = `${bytes.toString(8).padStart(11, "0")}\0`;
      header.write("ustar  \0", 257);
      header.write(`${size}00000000000\0`, 386);
      header.write(size, 483);
    },
  });

test("what only all files of a tar together come to is bounded too", async () => {
  const holes = Array.from({ length: 1000 }, (_, at) =>
    holeEntry(`blobs/sha256/${at.toString(16).padStart(64, "0")}`, 900 * 2 ** 20),
  );
  await fails(
    fileOf(Buffer.concat(holes)),
    /: its files unpack, all together, to more than 1000 times/,
  );

  const documents = Array.from({ length: 2000 }, (_, at) => holeEntry(`${at}`, 15 * 2 ** 20));
  const index = rawEntry({ name: "index.json", content: "{}" });
  const listed = await runMain(["--list-tar", fileOf(Buffer.concat([index, ...documents]))]);
  assert.equal(listed.exitCode, 1);

  const deep = "a/".repeat(1900);
  const paths = Array.from({ length: 2000 }, (_, at) =>
    rawEntry({ name: "x", pax: { path: `${at}/${deep}x` } }),
  );
  const layer = zlib.gzipSync(Buffer.concat(paths), { level: 9 });
  await fails(fileOf(tarOf([[blobName(digestOf(layer)), layer]])), /all together/);
});

test("what is read once for all, or said once for many", async () => {
  const entries = ociArchive([packed]).filter(([name]) => name !== "index.json");
  const { digest, bytes } = packed;
  const ofTypes = Array.from({ length: 5000 }, (_, at) => ({
    mediaType: `${MEDIA.ociManifest};${at}`,
    digest,
    size: bytes.length,
  }));
  const types: Entry = ["index.json", json({ schemaVersion: 2, manifests: ofTypes })];
  await fails(fileOf(tarOf([...entries, types])), /is said to be of two types\n/);

  const absent = Array.from({ length: 5000 }, (_, at) => ({
    mediaType: MEDIA.ociManifest,
    digest: digestOf(`absent ${at}`),
    size: 1,
  }));
  const missing: Entry = ["index.json", json({ schemaVersion: 2, manifests: absent })];
  const said = await fails(
    fileOf(tarOf([...entries, missing])),
    /: and 4000 more things are wrong\n/,
  );
  assert.equal(said.split("\n").length, 1002);

  const record = paxRecord("k", "v").toString();
  const extension = rawEntry({ name: "p", type: "x", content: record.repeat(170_000) });
  const many = zlib.gzipSync(Buffer.concat(Array(31).fill(extension)));
  await fails(fileOf(many), /its extended headers have more than 5000000 records, at byte \d+\n/);
});

async function boundedBy(name: string, tar: Buffer, seconds: number): Promise<string> {
  const file = fileOf(tar);
  const preload = join(folder, "tell-memory.cjs");
  writeFileSync(preload, TELL_MEMORY);
  const env = { NODE_OPTIONS: `--require ${preload}` };
  const startedAt = performance.now();
  const { exitCode, signal, stdout, stderr } = await runCommand(["--verify", file], { env });
  assert.ok(exitCode === 0 || exitCode === 1, `${name}: ${signal} ${stderr.slice(0, 500)}`);
  const tookMs = performance.now() - startedAt;
  assert.ok(tookMs < seconds * 1000, `${name} took ${Math.round(tookMs)} ms`);
  const [, peakKib = "0"] = /^peak (\d+) KiB$/m.exec(stderr) ?? [];
  assert.ok(Number(peakKib) < 300 * 1024, `${name} took ${peakKib} KiB`);
  return String(stdout) + stderr;
}

test("tars that are made to cost much: read once, in bounded memory, or refused by name", async () => {
  const ids = Array.from({ length: 40_000 }, (_, at) => digestOf(`id ${at}`));
  const config = json({ os: "linux", architecture: "amd64", rootfs: { diff_ids: ids } });
  const sharing = Array.from({ length: 1000 }, () => ({
    Config: "c.json",
    RepoTags: [],
    Layers: Array(40_000).fill("l"),
  }));
  assert.match(
    await boundedBy(
      "a thousand images of one config",
      tarOf([
        ["c.json", config],
        ["l", "layer"],
        ["manifest.json", json(sharing.slice(0, 10))],
      ]),
      20,
    ),
    /more than 300000 manifests and layers/,
  );
  const [entry] = JSON.parse(
    String(ociArchive([packed]).find(([name]) => name === "index.json")?.[1]),
  ).manifests;
  const manyTimes = ociArchive([packed]).map(
    ([name, content]): Entry => [
      name,
      name === "index.json"
        ? json({ schemaVersion: 2, manifests: Array(60_000).fill(entry) })
        : content,
    ],
  );
  assert.match(await boundedBy("60,000 equal entries", tarOf(manyTimes), 20), /60000 images/);

  const keys = Array.from({ length: 20_000 }, (_, at) => paxRecordOf(`key.${at}`, "v"));
  const header = writeTar([["PaxHeaders/x", Buffer.from(keys.join(""))]]);
  const extension = withType(header.subarray(0, -1024), "x");
  const tar = Buffer.concat([...Array(200).fill(extension), tarOf(ociArchive([packed]))]);
  assert.match(await boundedBy("pax keys", tar, 20), /all is right/);

  for (const deep of [
    "[".repeat(8_000_000),
    `${'{"a":'.repeat(2_000_000)}1${"}".repeat(2_000_000)}`,
  ])
    for (const name of ["index.json", "manifest.json"])
      assert.match(
        await boundedBy(`deep ${name}`, tarOf([[name, deep]]), 20),
        new RegExp(`${name} is not JSON, or nested too deep`),
      );
  const longNames = Array.from({ length: 100 }, (_, at) => `x${at}/${"y/".repeat(20_000)}z`);
  const named = longNames.map((name) => [withPath(name), header512("x")]);
  assert.match(
    await boundedBy("names of 20,000 folders", Buffer.concat(named.flat()), 20),
    /a name in it is too long/,
  );
  const folders = Array.from({ length: 36_000 }, (_, at) => header512(`d${at}/e/f/g/h/i/j`));
  assert.match(
    await boundedBy("folders", Buffer.concat(folders), 20),
    /more than 200000 entries, or too long names/,
  );
  const targets = Array.from({ length: 4500 }, (_, at) => withPath(`${at}`.padEnd(4000, "n")));
  assert.match(
    await boundedBy("names", Buffer.concat(targets.flatMap((each) => [each, header512("x")])), 20),
    /more than 200000 entries, or too long names/,
  );
  const tiny = Array.from({ length: 190_000 }, (_, at) => {
    const content = `{"a":${at}}`;
    return [header512(blobName(digestOf(content)), content.length), content.padEnd(512, "\0")];
  });
  const blobs = Buffer.concat(tiny.flat().map((each) => Buffer.from(each as string)));
  assert.match(await boundedBy("tiny blobs", blobs, 120), /cut off at byte 194560000/);
  const wide = `[${"{},".repeat(5_000_000)}{}]`;
  assert.match(
    await boundedBy("wide", tarOf([["manifest.json", wide]]), 20),
    /manifest\.json is not JSON, or nested too deep/,
  );
});

const header512 = (name: string, sizeBytes = 0): Buffer =>
  writeTar([[name, Buffer.alloc(sizeBytes)]]).subarray(0, 512);

/** The extended header that gives the entry after it a name. */
const withPath = (name: string): Buffer =>
  withType(
    writeTar([["PaxHeaders/x", Buffer.from(paxRecordOf("path", name))]]).subarray(0, -1024),
    "x",
  );

function paxRecordOf(key: string, value: string): string {
  const rest = ` ${key}=${value}\n`;
  let length = rest.length;
  while (length !== rest.length + String(length).length) length += 1;
  return `${length}${rest}`;
}

function withType(tar: Buffer, type: string): Buffer {
  const header = Buffer.from(tar);
  header.write(type, 156);
  header.write(" ".repeat(8), 148);
  const sum = header.subarray(0, 512).reduce((total, byte) => total + byte, 0);
  header.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148);
  return header;
}

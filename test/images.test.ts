// What one pull brings: several images, lists and lock files, whole indexes, artifacts.
import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import {
  type Bundle,
  dockerEntries,
  FIRST,
  fetched,
  IMAGES,
  indexEntries,
  OPTIONS,
  refNames,
  SECOND,
  serveBundle,
  succeed,
  THIRD,
} from "./support/bundle.ts";
import { runCommand, temporaryFolder } from "./support/command.ts";
import {
  makeArtifact,
  makeHelmChart,
  makeImage,
  makeImageLookalikes,
  makeIndex,
  makeMultiPlatform,
  makeOrasArtifact,
  makeWasmArtifact,
  type TestContent,
  type TestImage,
} from "./support/image.ts";
import { blobName, blobsOf, childOf, filesOf } from "./support/pull.ts";
import { startRegistry } from "./support/registry.ts";

// ====== Many images ======

test("many images in one tar: in the order given, each blob once, and one line on stdout for each", async (t) => {
  const { registry, references, folder } = await serveBundle(t);
  const [first, second, third] = references;
  const { stdout, stderr } = await succeed([...OPTIONS, second, first, third, "b.tar"], {
    cwd: folder,
  });
  const files = filesOf(readFileSync(join(folder, "b.tar")));
  const order = [IMAGES[1], IMAGES[0], THIRD] as TestImage[];
  const held = [...order.map(({ digest }) => digest), ...blobsOf(...order)];
  assert.deepEqual([...files.keys()].slice(3).sort(), held.map(blobName).sort());
  assert.deepEqual(refNames(indexEntries(files)), [second, first, third]);
  assert.deepEqual(
    indexEntries(files).map(({ digest }) => digest),
    order.map(({ digest }) => digest),
  );
  assert.deepEqual(
    dockerEntries(files),
    order.map(({ config, layers }, at) => ({
      Config: blobName(config.digest),
      RepoTags: [[second, first, third][at]],
      Layers: layers.map(({ digest }) => blobName(digest)),
    })),
  );
  assert.deepEqual(fetched(registry), blobsOf(...order).sort());
  assert.equal(
    String(stdout),
    order.map(({ digest }, at) => `${[second, first, third][at]}@${digest}\n`).join(""),
  );
  assert.match(stderr, /3 images/);
});

test("--from reads a file or stdin, with comments and other line ends; positionals come first", async (t) => {
  const {
    references: [first, second, third],
    folder,
  } = await serveBundle(t);
  await succeed([...OPTIONS, first, second, third, "plain.tar"], { cwd: folder });
  const plain = readFileSync(join(folder, "plain.tar"));
  const list = `# what goes to the other side\r\n\r\n  ${second}\t# the database\n\n${third}\r\n${first}`;
  writeFileSync(join(folder, "images.txt"), list);
  await succeed([...OPTIONS, first, "--from", "images.txt", "file.tar"], { cwd: folder });
  assert.ok(
    readFileSync(join(folder, "file.tar")).equals(plain),
    "an image named twice is there once",
  );
  await succeed([...OPTIONS, "--from=-", "stdin.tar"], {
    cwd: folder,
    stdin: `${first}\n${second}\n${third}\n`,
  });
  assert.ok(readFileSync(join(folder, "stdin.tar")).equals(plain));
});

for (const [name, content] of [
  ["missing", undefined],
  ["empty", ""],
  ["only comments", "# nothing\n\n"],
] as const) {
  test(`a list that is ${name} is an error that names it, and asks nothing`, async (t) => {
    const { registry, folder } = await serveBundle(t);
    if (content !== undefined) writeFileSync(join(folder, "images.txt"), content);
    const { exitCode, stderr } = await runCommand([...OPTIONS, "--from", "images.txt", "b.tar"], {
      cwd: folder,
    });
    assert.deepEqual([exitCode, registry.requests.length], [2, 0]);
    assert.match(
      stderr,
      content === undefined ? /images\.txt/ : /--from images\.txt: there is no image in it/,
    );
    assert.ok(!existsSync(join(folder, "b.tar")));
  });
}

for (const [name, args, pick] of [
  ["by tag", OPTIONS, ([first, second, third]) => [third, first, second]],
  ["by tag and digest of the index", OPTIONS, ([first]) => [`${first}@${FIRST.digest}`]],
  [
    "by the digest of an index alone",
    OPTIONS,
    ([first]) => [first.replace(":1.0", `@${FIRST.digest}`)],
  ],
  [
    "by the digest of a manifest alone",
    OPTIONS,
    ([, , third]) => [third.replace(/:3$/, `@${THIRD.digest}`)],
  ],
  ["every platform", ["--scheme", "http", "--platform", "all"], (references) => references],
  [
    "another platform",
    ["--scheme", "http", "--os=linux", "--arch=arm64"],
    ([first, second]) => [second, first],
  ],
] as [string, string[], (references: Bundle["references"]) => string[]][]) {
  test(`the lock file gives the same bytes again, when all tags have moved: ${name}`, async (t) => {
    const { registry, references, folder } = await serveBundle(t);
    const { stdout } = await succeed([...args, ...pick(references), "a.tar"], { cwd: folder });
    for (const [at, repository] of ["team/first", "team/second", "third"].entries()) {
      registry.add(makeImage({ seed: `moved-${at}` }), repository, ["1.0", "2.0", "3"][at]);
    }
    writeFileSync(join(folder, "images.lock"), stdout);
    const again = await succeed([...args, "--from", "images.lock", "b.tar"], { cwd: folder });
    assert.ok(readFileSync(join(folder, "a.tar")).equals(readFileSync(join(folder, "b.tar"))));
    assert.equal(String(again.stdout), String(stdout));
  });
}

test("every failure of a bundle is named at once, before a layer moves", async (t) => {
  const {
    registry,
    references: [first, second, third],
    folder,
  } = await serveBundle(t);
  registry.on({ repository: "team/secret" }, { status: 403 });
  registry.add(
    makeMultiPlatform(["windows/amd64", "linux/s390x"], { seed: "other" }),
    "team/other",
    "9",
  );
  const bad = [
    first.replace("1.0", "1.1"),
    `${registry.host}/team/none:1`,
    `${registry.host}/team/secret:1`,
    `${registry.host}/team/other:9`,
  ];
  writeFileSync(join(folder, "b.tar"), "precious");
  const args = [...OPTIONS, "--retries=0", first, ...bad, second, third, "b.tar"];
  const { exitCode, stderr, stdout } = await runCommand(args, { cwd: folder });
  assert.deepEqual([exitCode, stdout.length], [1, 0]);
  const named = [
    /team\/first:1\.1/,
    /team\/none/,
    /team\/secret/,
    /team\/other:9.*linux\/amd64/,
    /linux\/s390x/,
  ];
  for (const words of named) assert.match(stderr, words);
  assert.doesNotMatch(stderr, /team\/second|third:3/, "what is right is not blamed");
  assert.equal(registry.seen({ kind: "layer" }).length, 0);
  assert.deepEqual(readdirSync(folder), ["b.tar"]);
  assert.equal(readFileSync(join(folder, "b.tar"), "utf8"), "precious");
});

test("every bad reference of a bundle is named at once, before any request", async (t) => {
  const {
    registry,
    references: [first],
    folder,
  } = await serveBundle(t);
  const list = `${first}\n${registry.host}/UPPER:1\nhttps://example.com/app\nexample.com/app@sha256:12\n`;
  const { exitCode, stderr } = await runCommand([...OPTIONS, "--from", "-", "b.tar"], {
    cwd: folder,
    stdin: list,
  });
  assert.deepEqual([exitCode, registry.requests.length], [2, 0]);
  for (const words of [/UPPER/, /https:\/\/example\.com\/app/, /sha256:12/])
    assert.match(stderr, words);
});

test("images of a bundle are resolved side by side", { timeout: 30_000 }, async (t) => {
  const { registry, references, folder } = await serveBundle(t);
  const tags = {
    kind: "manifest",
    where: ({ reference }: { reference: string }) => !reference.includes(":"),
  } as const;
  registry.on(tags, { wait: registry.arrived(tags, 3) });
  await succeed([...OPTIONS, ...references, "b.tar"], { cwd: folder });
});

test("one token serves a repository, however many tags and blobs", async (t) => {
  const {
    registry,
    references: [first, second],
    folder,
  } = await serveBundle(t, { auth: "bearer" });
  const other = registry.add(SECOND, "team/first", "other");
  await succeed([...OPTIONS, first, other, second, "b.tar"], { cwd: folder });
  assert.deepEqual(
    registry
      .tokenRequests()
      .map(({ query }) => query.get("scope"))
      .sort(),
    ["repository:team/first:pull", "repository:team/second:pull"],
  );
});

// ====== Whole indexes, artifacts ======

test("--platform all keeps the index byte for byte, with every child, attestations too", async (t) => {
  const registry = await startRegistry({}, t);
  const inner = makeMultiPlatform(["linux/riscv64"], { seed: "inner" });
  const app = makeMultiPlatform(["linux/arm64", "linux/amd64", "linux/arm/v7"], {
    seed: "app",
    attestations: true,
  });
  const index = makeIndex([...app.children.map((content) => ({ content })), inner]);
  const dest = join(temporaryFolder(t), "all.tar");
  const reference = registry.add(index, "team/app", "1.0");
  const { stdout } = await succeed(["--scheme", "http", "--platform", "all", reference, dest]);
  const files = filesOf(readFileSync(dest));
  const expected = [...index.manifests.keys(), ...index.blobs.keys()].map(blobName);
  assert.deepEqual([...files.keys()].slice(3).sort(), expected.sort());
  assert.ok(files.get(blobName(index.digest))?.equals(index.bytes));
  assert.deepEqual(
    indexEntries(files).map(({ digest, size }) => [digest, size]),
    [[index.digest, index.bytes.length]],
  );
  const amd64 = childOf(app, 1);
  assert.deepEqual(
    dockerEntries(files).map(({ Config, RepoTags }) => [Config, RepoTags]),
    [[blobName(amd64.config.digest), [reference]]],
  );
  assert.equal(String(stdout), `${reference}@${index.digest}\n`);
});

test("things that are not images are pulled as they are, and left out of manifest.json", async (t) => {
  const registry = await startRegistry({}, t);
  const artifacts: [string, TestContent][] = [
    ["chart", makeHelmChart()],
    ["report", makeOrasArtifact()],
    ["wasm", makeWasmArtifact()],
    ...Object.entries(makeImageLookalikes()),
  ];
  const references = artifacts.map(([name, content]) => registry.add(content, name, "1"));
  const image = registry.add(THIRD, "third", "3");
  const dest = join(temporaryFolder(t), "b.tar");
  const { stdout } = await succeed(["--scheme", "http", ...references, image, dest]);
  const files = filesOf(readFileSync(dest));
  const held = artifacts.flatMap(([, content]) => [content.digest, ...content.blobs.keys()]);
  for (const digest of held) assert.ok(files.has(blobName(digest)), digest);
  const tops = [...artifacts.map(([, { digest }]) => digest), THIRD.digest];
  assert.deepEqual(
    indexEntries(files).map(({ digest }) => digest),
    tops,
  );
  assert.deepEqual(
    dockerEntries(files).map(({ RepoTags }) => RepoTags),
    [[image]],
  );
  assert.equal(String(stdout).split("\n").length, artifacts.length + 2);

  // The same rule for --verify: what loads is the one image.
  const verified = await runCommand(["--verify", dest]);
  assert.deepEqual([verified.exitCode, verified.stderr], [0, ""]);
  assert.match(String(verified.stdout), /loads in docker, podman/);
  const alone = join(temporaryFolder(t), "alone.tar");
  for (const reference of references) {
    await succeed(["--scheme", "http", reference, alone]);
    const { exitCode, stdout: said } = await runCommand(["--verify", alone]);
    assert.equal(exitCode, 0);
    assert.doesNotMatch(String(said), /docker|podman/, reference);
  }
});

test("an image's config that is no JSON object is an error, and one without diff_ids a warning", async (t) => {
  const registry = await startRegistry({}, t);
  const folder = temporaryFolder(t);
  const { layers } = makeImage({ seed: "config" });
  const layer = {
    mediaType: "application/vnd.oci.image.layer.v1.tar+gzip",
    bytes: layers[0]?.bytes,
  };
  const artifact = (text: string) =>
    makeArtifact({
      configMediaType: "application/vnd.oci.image.config.v1+json",
      configBytes: Buffer.from(text),
      layers: [layer as { mediaType: string; bytes: Buffer }],
    });
  for (const text of ["[]", '"words"', "null", "words", ""]) {
    const reference = registry.add(artifact(text), "team/app", "1");
    const { exitCode, stderr } = await runCommand(["-s", "http", reference, join(folder, "a.tar")]);
    assert.equal(exitCode, 1, text);
    assert.match(stderr, /its config is not a JSON object/);
  }
  const words = { os: "linux", architecture: "amd64", rootfs: { diff_ids: [] } };
  const reference = registry.add(artifact(JSON.stringify(words)), "team/app", "2");
  const args = ["-s", "http", "--platform", "linux/amd64", reference, join(folder, "b.tar")];
  const { exitCode, stderr } = await runCommand(args);
  assert.equal(exitCode, 0, stderr);
  assert.match(stderr, /no image that loads: its config has not one diff_id for each layer/);
});

const AMD64 = ["--scheme", "http", "--platform", "linux/amd64", "-q"];

test("a manifest that its registry knows by sha512 is pinned so that it is found again", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(makeImage({ algorithm: "sha512" }), "team/app", "1.0");
  const folder = temporaryFolder(t);
  const { stdout } = await runCommand([reference, join(folder, "a.tar"), ...AMD64]);
  const again = await runCommand([String(stdout).trim(), join(folder, "b.tar"), ...AMD64]);
  assert.equal(again.exitCode, 0, again.stderr);
  assert.ok(readFileSync(join(folder, "b.tar")).equals(readFileSync(join(folder, "a.tar"))));
});

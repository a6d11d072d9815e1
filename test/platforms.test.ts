// Several platforms of an index, which is kept byte for byte.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { pullImages } from "../imgpull.ts";
import { runCommand, temporaryFolder } from "./support/command.ts";
import { makeImage, makeIndex, makeMultiPlatform, type TestContent } from "./support/image.ts";
import { assertFailed, blobName, childOf, filesOf, tryPull } from "./support/pull.ts";
import { type Registry, startRegistry } from "./support/registry.ts";

const FIVE = ["linux/amd64", "linux/arm64", "linux/arm/v6", "linux/arm/v7", "windows/amd64"];
const index = makeMultiPlatform(FIVE, { seed: "five" });
const TWO = [
  { os: "linux", architecture: "amd64" },
  { os: "linux", architecture: "arm64" },
];

async function serve(t: TestContext, content: TestContent): Promise<[string, Registry]> {
  const registry = await startRegistry({}, t);
  return [registry.add(content, "team/app", "1.0"), registry];
}

async function pullTwo(t: TestContext, content: TestContent) {
  const [reference] = await serve(t, content);
  const outcome = await tryPull(t, reference, { scheme: "http", retries: 0, several: TWO });
  if (outcome.error) throw outcome.error;
  return { outcome, files: filesOf(readFileSync(outcome.tar)) };
}

const manifestsIn = (files: Map<string, Buffer>, name: string) =>
  JSON.parse(String(files.get(name)));

test("the index and those images, no others", async (t) => {
  const { outcome, files } = await pullTwo(t, index);
  const [amd64, arm64] = [childOf(index, 0), childOf(index, 1)];

  assert.deepEqual(files.get(blobName(index.digest)), index.bytes);
  const held = [index, amd64, arm64].map(({ digest }) => digest);
  const blobs = [amd64, arm64].flatMap(({ blobs: each }) => [...each.keys()]);
  const names = ["oci-layout", "index.json", "manifest.json", ...[...held, ...blobs].map(blobName)];
  assert.deepEqual([...files.keys()].sort(), [...new Set(names)].sort());

  assert.deepEqual(
    manifestsIn(files, "index.json").manifests.map(({ digest }: TestContent) => digest),
    [index.digest],
  );
  const [docker] = manifestsIn(files, "manifest.json");
  assert.equal(docker.Config, blobName(amd64.config.digest));
  assert.equal(outcome.result?.digest, index.digest);
  assert.equal(outcome.result?.platform, "linux/amd64,linux/arm64");
});

test("stderr names the commands that want the whole index, and how much of it is there", async (t) => {
  const { outcome } = await pullTwo(t, index);
  const [warning = ""] = outcome.warnings;
  assert.match(warning, /2 of 5 platforms/);
  for (const command of ["ctr --all-platforms", "skopeo --all", "crane push"])
    assert(warning.includes(command), warning);
});

test("an index of just these says nothing; without its attestations it does", async (t) => {
  const platforms = ["linux/amd64", "linux/arm64"];
  const whole = await pullTwo(t, makeMultiPlatform(platforms));
  assert.deepEqual(whole.outcome.warnings, []);
  const attested = await pullTwo(t, makeMultiPlatform(platforms, { attestations: true }));
  assert.match(attested.outcome.warnings.join(), /2 of 2 platforms, without their attestations/);
});

test("the order of the platforms, and one given twice, change nothing", async (t) => {
  const [reference] = await serve(t, index);
  const tars = [];
  for (const several of [TWO, TWO.toReversed(), [...TWO, ...TWO]]) {
    const outcome = await tryPull(t, reference, { scheme: "http", retries: 0, several });
    tars.push(readFileSync(outcome.tar));
  }
  for (const tar of tars) assert(tar.equals(tars[0] as Buffer));
});

test("indexes between the index and its images are kept too", async (t) => {
  const inner = makeMultiPlatform(["linux/amd64"], { seed: "inner" });
  const arm64 = makeImage({ seed: "arm64", platform: "linux/arm64" });
  const outer = makeIndex([{ content: inner, platform: "linux/amd64" }, arm64]);
  const { files } = await pullTwo(t, outer);
  for (const { digest, bytes } of [outer, inner, childOf(inner), arm64])
    assert.deepEqual(files.get(blobName(digest)), bytes);
});

for (const [name, content] of [
  ["an index", index],
  ["a lone image", makeImage({ platform: "linux/amd64" })],
] as const) {
  test(`a platform that ${name} lacks is an error that names those it has`, async (t) => {
    const [reference] = await serve(t, content);
    const several = [{ os: "linux", architecture: "s390x" }];
    const outcome = await tryPull(t, reference, { scheme: "http", retries: 0, several });
    assertFailed(outcome, "NO_PLATFORM", /linux\/s390x/, /linux\/amd64/);
  });
}

test("every platform that is missing is named at once", async (t) => {
  const [reference] = await serve(t, index);
  const several = ["s390x", "riscv64"].map((architecture) => ({ os: "linux", architecture }));
  const { error } = await tryPull(t, reference, { scheme: "http", retries: 0, several });
  assert.match(String(error), /linux\/s390x[\s\S]*linux\/riscv64/);
});

test("a lone image is its own only platform", async (t) => {
  const image = makeImage({ platform: "linux/amd64" });
  const [reference] = await serve(t, image);
  const several = TWO.slice(0, 1);
  const outcome = await tryPull(t, reference, { scheme: "http", retries: 0, several });
  assert.equal(outcome.result?.digest, image.digest);
});

test("command and library give the same tar, and the same digest to the lock file", async (t) => {
  const [reference] = await serve(t, index);
  const folder = temporaryFolder(t);
  const [byCommand, byLibrary] = [join(folder, "command.tar"), join(folder, "library.tar")];
  const platforms = ["linux/amd64", "linux/arm64"];
  const flags = ["--scheme", "http", "--platform", platforms.join(",")];
  const { exitCode, stdout, stderr } = await runCommand([reference, byCommand, ...flags]);
  assert.equal(exitCode, 0, stderr);
  assert.match(stderr, /2 of 5 platforms/);
  assert.equal(String(stdout).trim(), `${reference}@${index.digest}`);

  const report = await pullImages([reference], byLibrary, { scheme: "http", platforms });
  assert.equal(report.images[0]?.digest, index.digest);
  assert(readFileSync(byCommand).equals(readFileSync(byLibrary)));
});

test("--verify and --list-tar say how many of the platforms are here", async (t) => {
  const attested = makeMultiPlatform(FIVE, { seed: "attested", attestations: true });
  const inner = makeMultiPlatform(["linux/arm64", "linux/s390x"], { seed: "inner" });
  const nested = makeIndex([childOf(index), { content: inner, platform: "linux/arm64" }]);
  for (const [content, platforms, more] of [
    [index, "2 of 5 platforms", ""],
    [attested, "2 of 5 platforms", "5 more of an index not here"],
    [nested, "2 of 3 platforms", ""],
  ] as const) {
    const { outcome } = await pullTwo(t, content);
    const verified = await runCommand(["--verify", outcome.tar]);
    assert.equal(verified.exitCode, 0, verified.stderr);
    assert.match(
      String(verified.stdout),
      new RegExp(`2 images, .*, ${platforms}${more && `, ${more}`}: all`),
    );
    const { stdout } = await runCommand(["--list-tar", outcome.tar]);
    const lines = String(stdout)
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line));
    const [, here, named] = /(\d) of (\d)/.exec(platforms) ?? [];
    for (const line of lines)
      assert.deepEqual(line.platforms, { here: Number(here), named: Number(named) });
  }
});

test("they say nothing of the kind where all of an index is here, or one image", async (t) => {
  for (const content of [makeMultiPlatform(["linux/amd64", "linux/arm64"]), makeImage()]) {
    const [reference] = await serve(t, content);
    const outcome = await tryPull(t, reference, { scheme: "http", isAll: true });
    const { stdout } = await runCommand(["--verify", outcome.tar]);
    assert.doesNotMatch(String(stdout), /platform|of an index/);
    const listed = await runCommand(["--list-tar", outcome.tar]);
    assert.doesNotMatch(String(listed.stdout), /platforms/);
  }
});

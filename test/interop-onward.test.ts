// From the tar into a registry on the other side, by other people's programs: which of them keep
// the digest. The page's own command blocks are what is run. And tars in parts.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { delimiter, join } from "node:path";
import { after, before, describe, test } from "node:test";
import { ociArchive } from "./support/archives.ts";
import { COMMAND_PATH } from "./support/command.ts";
import { makeImage, makeMultiPlatform, type TestContent } from "./support/image.ts";
import {
  type Containerd,
  type Docker,
  HOST_ARCHITECTURE,
  imgpull,
  interopFolder,
  pushImage,
  type RealRegistry,
  run,
  skipWithout,
  skopeo,
  startContainerd,
  startDocker,
  startRealRegistry,
  storedManifest,
} from "./support/interop.ts";
import { readmeBlocks } from "./support/readme.ts";

const skip = skipWithout(
  "docker-registry",
  "dockerd",
  "docker",
  "containerd",
  "ctr",
  "skopeo",
  "crane",
  "regctl",
  "oras",
  "jq",
  "bash",
);
const HTTP = ["--scheme", "http"];
const platform = `linux/${HOST_ARCHITECTURE}`;
const IMAGES: Record<string, TestContent> = {
  oci: makeImage({ seed: "onward-oci", platform }),
  docker: makeImage({ seed: "onward-docker", format: "docker", platform }),
};
const INDEX = makeMultiPlatform([platform, "linux/s390x"], { seed: "onward-index" });

describe("interop: onward into a registry", { skip }, () => {
  let source: RealRegistry;
  let target: RealRegistry;
  let containerd: Containerd;
  let docker: Docker;
  let folder: string;
  let bundle: string;

  before(async () => {
    source = await startRealRegistry();
    target = await startRealRegistry();
    containerd = await startContainerd();
    docker = await startDocker(containerd);
    folder = interopFolder("onward");
    bundle = join(folder, "bundle.tar");
    for (const [name, image] of Object.entries(IMAGES))
      await pushImage(image, `${source.host}/org/${name}:1`);
    await imgpull([
      ...Object.keys(IMAGES).map((name) => `${source.host}/org/${name}:1`),
      bundle,
      ...HTTP,
    ]);
  });

  after(async () => {
    await docker?.stop();
    await containerd?.stop();
    await target?.stop();
    await source?.stop();
  });

  async function digestThere(name: string): Promise<string> {
    const [repository = "", tag = ""] = name.split(":");
    return (await storedManifest(target.host, repository, tag)).digest;
  }

  function inShell(script: string, cwd: string) {
    const programs = interopFolder("programs");
    symlinkSync(COMMAND_PATH, join(programs, "imgpull"));
    const PATH = [programs, process.env.PATH].join(delimiter);
    const env = { ...process.env, ...docker.environment, PATH, HOME: folder };
    return spawnSync("bash", ["-euo", "pipefail", "-c", script], { cwd, env, encoding: "utf8" });
  }

  /** A block of the page, for a folder of our registry, which has no TLS. */
  function runBlock(pattern: RegExp, folderThere: string, cwd = folder): void {
    const block = readmeBlocks("sh").find(({ text }) => pattern.test(text));
    assert.ok(block, `${pattern}`);
    const script = block.text
      .replaceAll("registry.there.example", `${target.host}/${folderThere}`)
      .replaceAll("regctl image", `regctl --host reg=${target.host},tls=disabled image`)
      .replaceAll("oras cp", "oras cp --to-plain-http");
    const { status, stderr } = inShell(script, cwd);
    assert.equal(status, 0, `${script}\n${stderr}`);
  }

  /** By oras, byte for byte. */
  async function pushIndex(name: string): Promise<void> {
    const layout = interopFolder("index");
    for (const [entry, content] of ociArchive([INDEX])) {
      mkdirSync(join(layout, entry, ".."), { recursive: true });
      if (typeof content === "string" || Buffer.isBuffer(content))
        writeFileSync(join(layout, entry), content);
    }
    const from = ["--from-oci-layout", `${layout}@${INDEX.digest}`];
    await run(["oras", "cp", ...from, "--to-plain-http", name]);
  }

  /** Every image of the bundle is there, with its digest. */
  async function assertThere(folderThere: string): Promise<void> {
    for (const [name, image] of Object.entries(IMAGES))
      assert.equal(await digestThere(`${folderThere}/org/${name}:1`), image.digest, name);
  }

  test("a loop over --list-tar with regctl keeps every digest of a bundle", async () => {
    runBlock(/regctl image import/, "by-regctl");
    await assertThere("by-regctl");
  });

  test("so does one with oras", async () => {
    runBlock(/oras cp --from-oci-layout-path bundle/, "by-oras");
    await assertThere("by-oras");
  });

  test("of one image: skopeo keeps the digest from the layout, and makes a new one from docker's archive; so does crane", async () => {
    for (const [name, image] of Object.entries(IMAGES)) {
      const tar = join(folder, `${name}.tar`);
      await imgpull([`${source.host}/org/${name}:1`, tar, ...HTTP]);
      const place = (by: string) => `${target.host}/${by}/${name}:1`;
      const copy = (kind: string) =>
        skopeo("copy", "--dest-tls-verify=false", `${kind}:${tar}`, `docker://${place(kind)}`);
      await copy("oci-archive");
      assert.equal(await digestThere(`oci-archive/${name}:1`), image.digest);
      await copy("docker-archive");
      assert.notEqual(await digestThere(`docker-archive/${name}:1`), image.digest);
      await run(["crane", "push", "--insecure", tar, place("crane")]);
      assert.notEqual(await digestThere(`crane/${name}:1`), image.digest);
    }
    const bundled = run(["crane", "push", "--insecure", bundle, `${target.host}/crane/bundle:1`]);
    await assert.rejects(bundled, /must contain only a single image/);
  });

  test("an index, with all its platforms: by regctl, oras and skopeo", async () => {
    const name = `${source.host}/org/index:1`;
    await pushIndex(name);
    const tar = join(folder, "index.tar");
    await imgpull([name, tar, ...HTTP, "--platform", "all"]);
    const plain = ["--host", `reg=${target.host},tls=disabled`];
    await run(["regctl", ...plain, "image", "import", `${target.host}/index/regctl:1`, tar]);
    const from = ["--from-oci-layout", `${tar}@${INDEX.digest}`];
    await run(["oras", "cp", "--to-plain-http", ...from, `${target.host}/index/oras:1`]);
    const there = `docker://${target.host}/index/skopeo:1`;
    await skopeo("copy", "--all", "--dest-tls-verify=false", `oci-archive:${tar}`, there);
    for (const program of ["regctl", "oras", "skopeo"])
      assert.equal(await digestThere(`index/${program}:1`), INDEX.digest, program);
  });

  test("the loops keep an index with all its platforms, too", async () => {
    const name = `${source.host}/org/whole:1`;
    await pushIndex(name);
    const cwd = interopFolder("whole");
    await imgpull([name, join(cwd, "bundle.tar"), ...HTTP, "--platform", "all"]);
    runBlock(/regctl image import/, "whole-by-regctl", cwd);
    runBlock(/oras cp --from-oci-layout-path bundle/, "whole-by-oras", cwd);
    for (const program of ["regctl", "oras"])
      assert.equal(await digestThere(`whole-by-${program}/org/whole:1`), INDEX.digest, program);
  });

  test("a tar in parts is verified and loaded from a pipe", async () => {
    const parts = join(folder, "parts");
    mkdirSync(parts);
    const name = `${source.host}/org/oci:1`;
    const script = `imgpull ${name} - -s http -q | split -b 5000 - part. &&
      cat part.* | imgpull --verify - && cat part.* | docker load`;
    const { status, stdout, stderr } = inShell(script, parts);
    assert.equal(status, 0, stderr);
    assert.match(stdout, /^-: 1 image, .*all is right\nloads in docker.*\nLoaded image: /);
  });
});

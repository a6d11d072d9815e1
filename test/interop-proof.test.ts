// Proof across the gap with real programs: cosign signs, oras attaches, the registry goes away, and
// on the other side docker, podman, ctr, skopeo, cosign and oras take what one tar brought.
import assert from "node:assert/strict";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { runCommand } from "./support/command.ts";
import { makeImage, makeMultiPlatform, type TestContent } from "./support/image.ts";
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
  startReferrersRegistry,
  storedManifest,
} from "./support/interop.ts";
import { blobName, childOf, filesOf } from "./support/pull.ts";

const skip = skipWithout(
  "containerd",
  "cosign",
  "ctr",
  "docker",
  "docker-registry",
  "dockerd",
  "openssl",
  "oras",
  "podman",
  "referrers-registry",
  "regctl",
  "skopeo",
  "tar",
);
const HTTP = ["--scheme", "http"];
const platform = `linux/${HOST_ARCHITECTURE}`;
const FOREIGN = HOST_ARCHITECTURE === "amd64" ? "linux/arm64" : "linux/amd64";

const image = makeImage({ seed: "proof", platform });
const index = makeMultiPlatform([platform, FOREIGN], { seed: "proof of an index" });

// ====== Signing ======

/** A key pair of cosign's, in a folder of its own. */
async function makeKeys(): Promise<{ key: string; pub: string }> {
  const folder = interopFolder("keys");
  await run(["cosign", "generate-key-pair"], { cwd: folder, env: { COSIGN_PASSWORD: "" } });
  return { key: join(folder, "cosign.key"), pub: join(folder, "cosign.pub") };
}

type SignatureForm = "signature under a tag" | "bundle";

/** Without a transparency log, which is not of this side of the gap. */
async function signWithCosign(reference: string, key: string, form: SignatureForm): Promise<void> {
  const isBundle = form === "bundle";
  const flags = ["--tlog-upload=false", "--use-signing-config=false", "--yes"];
  const command = ["cosign", "sign", "--key", key, `--new-bundle-format=${isBundle}`, ...flags];
  await run([...command, reference], { env: { COSIGN_PASSWORD: "" } });
}

const cosignVerify = (pub: string, ...words: string[]): Promise<string> =>
  run(["cosign", "verify", "--key", pub, "--insecure-ignore-tlog", ...words]);

/** An index with all its images, by oras, byte for byte. */
async function pushIndex(content: TestContent, reference: string): Promise<void> {
  const folder = interopFolder("layout");
  mkdirSync(join(folder, "blobs/sha256"), { recursive: true });
  const { mediaType, digest, bytes } = content;
  for (const [each, held] of content.manifests)
    writeFileSync(join(folder, blobName(each)), held.bytes);
  for (const [each, held] of content.blobs) writeFileSync(join(folder, blobName(each)), held);
  writeFileSync(join(folder, "oci-layout"), '{"imageLayoutVersion":"1.0.0"}');
  const manifests = [{ mediaType, digest, size: bytes.length }];
  writeFileSync(join(folder, "index.json"), JSON.stringify({ schemaVersion: 2, manifests }));
  const from = ["--from-oci-layout", `${folder}@${digest}`];
  await run(["oras", "cp", ...from, "--to-plain-http", reference]);
}

async function unpack(tar: string): Promise<string> {
  const folder = interopFolder("unpacked");
  await run(["tar", "-xf", tar, "-C", folder]);
  return folder;
}

const filesIn = (tar: string): Map<string, Buffer> => filesOf(readFileSync(tar));

const KINDS: [name: string, start: () => Promise<RealRegistry>][] = [
  ["a registry with the referrers endpoint", startReferrersRegistry],
  ["docker-registry, which has none", startRealRegistry],
];

describe("interop: proof that travels", { skip }, () => {
  const podman = skip === false ? makePodman() : undefined;
  let containerd: Containerd;
  let docker: Docker;
  let keys: { key: string; pub: string };
  let strangers: { key: string; pub: string };
  /** On the other side. */
  let target: RealRegistry;

  before(async () => {
    containerd = await startContainerd();
    docker = await startDocker(containerd);
    target = await startReferrersRegistry();
    [keys, strangers] = [await makeKeys(), await makeKeys()];
  });
  after(async () => {
    await docker?.stop();
    await containerd?.stop();
    await target?.stop();
  });

  /** Signed and pulled into one tar, and the registry is gone. */
  async function carry(
    start: () => Promise<RealRegistry>,
    forms: SignatureForm[],
    content: TestContent = image,
    ...flags: string[]
  ): Promise<{ tar: string; name: string }> {
    const registry = await start();
    const name = `${registry.host}/team/app:1.0`;
    if ("children" in content) await pushIndex(content, name);
    else await pushImage(content, name);
    const { digest } = await storedManifest(registry.host, "team/app", "1.0");
    assert.equal(digest, content.digest);
    const pinned = `${registry.host}/team/app@${digest}`;
    for (const form of forms) await signWithCosign(pinned, keys.key, form);

    const tar = join(interopFolder("tar"), "app.tar");
    await imgpull([name, tar, "--referrers", "--signed-by", keys.pub, ...HTTP, ...flags]);
    await registry.stop();
    await assertSigned(tar);
    return { tar, name };
  }

  /** Offline, by the one key and not by another. */
  async function assertSigned(tar: string): Promise<void> {
    const said = await imgpull(["--verify", tar, "--signed-by", keys.pub]);
    assert.match(said, /all is right, and signed by a key given/);
    const { exitCode, stderr } = await runCommand(["--verify", tar, "--signed-by", strangers.pub]);
    assert.equal(exitCode, 1);
    assert.match(stderr, /found: 1 signature made by another key/);
  }

  async function assertLoads({ tar, name }: { tar: string; name: string }): Promise<void> {
    await docker.docker("load", "--input", tar);
    await docker.docker("image", "inspect", name);
    await docker.docker("image", "rm", "--force", name);

    await podman?.("load", "--input", tar);
    await podman?.("image", "inspect", name);
    await podman?.("image", "rm", "--force", name);

    await containerd.ctr("images", "import", "--snapshotter", "native", tar);
    const images = await containerd.ctr("images", "ls", "--quiet");
    assert.equal(images.trim(), name, "nothing of the proof became an image");
    await containerd.ctr("images", "rm", "--sync", name);

    await skopeo("inspect", `oci-archive:${tar}:${name}`);
  }

  for (const [kind, start] of KINDS) {
    for (const form of ["signature under a tag", "bundle"] as const) {
      test(`${kind}: a ${form} crosses the gap`, async () => {
        const carried = await carry(start, [form]);
        await assertLoads(carried);
        await containerd.ctr("images", "import", "--snapshotter", "native", carried.tar);
        assert.equal(await manifestDigestInContainerd(containerd, carried.name), image.digest);
        await containerd.ctr("images", "rm", "--sync", carried.name);
        await cosignVerify(keys.pub, "--local-image", await unpack(carried.tar));
        await assert.rejects(
          cosignVerify(strangers.pub, "--local-image", await unpack(carried.tar)),
        );
      });
    }
  }

  test("oras carries image and bundle on into another registry, where cosign accepts them", async () => {
    const { tar, name } = await carry(startReferrersRegistry, ["bundle"]);
    const carried = `${target.host}/carried/app:1.0`;
    const from = ["--from-oci-layout-path", tar, name];
    await run(["oras", "cp", "-r", ...from, "--to-plain-http", carried]);
    await cosignVerify(keys.pub, carried);
    await assert.rejects(cosignVerify(strangers.pub, carried));
  });

  for (const [kind, start] of KINDS) {
    test(`${kind}: SBOMs by oras and regctl come along, and go on by oras`, async () => {
      const registry = await start();
      const name = `${registry.host}/team/app:1.0`;
      await pushImage(image, name);
      const folder = interopFolder("sbom");
      const file = join(folder, "sbom.json");
      writeFileSync(file, '{"spdxVersion":"SPDX-2.3"}');
      const spdx = ["--artifact-type", "application/spdx+json"];
      await run(["oras", "attach", "--plain-http", ...spdx, name, "sbom.json"], { cwd: folder });
      const cyclone = ["--artifact-type", "application/vnd.cyclonedx+json"];
      const plain = ["--host", `reg=${registry.host},tls=disabled`];
      await run(["regctl", ...plain, "artifact", "put", ...cyclone, "-f", file, "--subject", name]);

      const tar = join(folder, "app.tar");
      await imgpull([name, tar, "--referrers", ...HTTP]);
      await registry.stop();

      const carried = `${target.host}/sboms-of-${registry.port}/app:1.0`;
      const from = ["--from-oci-layout-path", tar, name];
      await run(["oras", "cp", "-r", ...from, "--to-plain-http", carried]);
      const there = ["--host", `reg=${target.host},tls=disabled`];
      const listed = await run(["regctl", ...there, "artifact", "list", carried]);
      const { manifests } = JSON.parse(String(filesIn(tar).get("index.json")));
      const [, ...referrers] = manifests as { digest: string; artifactType: string }[];
      const types = referrers.map(({ artifactType }) => artifactType).sort();
      assert.deepEqual(types, ["application/spdx+json", "application/vnd.cyclonedx+json"]);
      for (const { digest } of referrers) assert(listed.includes(digest), listed);
    });
  }

  for (const forms of [["bundle"], ["signature under a tag"]] as SignatureForm[][]) {
    test(`an index with a ${forms}: one platform, and all of them`, async () => {
      const one = await carry(startReferrersRegistry, forms, index, "--platform", platform);
      await assertLoads(one);
      assert.deepEqual(filesIn(one.tar).get(blobName(index.digest)), index.bytes);
      assert(filesIn(one.tar).has(blobName(childOf(index).digest)));
      await cosignVerify(keys.pub, "--local-image", await unpack(one.tar));

      const all = await carry(startReferrersRegistry, forms, index, "--platform", "all");
      await assertLoads(all);
      await cosignVerify(keys.pub, "--local-image", await unpack(all.tar));
    });
  }

  test("a platform of a signed index that is not this machine's is imported all the same", async () => {
    const flags = ["--platform", FOREIGN];
    const { tar, name } = await carry(startReferrersRegistry, ["bundle"], index, ...flags);
    await containerd.ctr("images", "import", "--no-unpack", tar);
    const digest = await manifestDigestInContainerd(containerd, name);
    assert.equal(digest, childOf(index, 1).digest);
    await containerd.ctr("images", "rm", "--sync", name);
  });

  test("an index whose bundle goes on with it by oras is accepted there", async () => {
    const { tar, name } = await carry(
      startReferrersRegistry,
      ["bundle"],
      index,
      "--platform",
      "all",
    );
    const carried = `${target.host}/carried/index:1.0`;
    await run([
      "oras",
      "cp",
      "-r",
      "--from-oci-layout-path",
      tar,
      name,
      "--to-plain-http",
      carried,
    ]);
    await cosignVerify(keys.pub, carried);
  });

  test("an index with some of its images loads, and is signed as a whole", async () => {
    const three = makeMultiPlatform([platform, FOREIGN, "linux/s390x"], { seed: "some of three" });
    const some = ["--platform", `${platform},${FOREIGN}`];
    const carried = await carry(startReferrersRegistry, ["bundle"], three, ...some);
    const files = filesIn(carried.tar);
    assert(files.has(blobName(childOf(three, 1).digest)));
    assert(!files.has(blobName(childOf(three, 2).digest)));
    await assertLoads(carried);
    await cosignVerify(keys.pub, "--local-image", await unpack(carried.tar));

    await containerd.ctr("images", "import", "--snapshotter", "native", carried.tar);
    assert.equal(await manifestDigestInContainerd(containerd, carried.name), three.digest);
    await containerd.ctr("images", "rm", "--sync", carried.name);
    const refused = containerd.ctr("images", "import", "--all-platforms", carried.tar);
    await assert.rejects(refused, /not found/, "what stderr says of ctr --all-platforms");
  });

  test("an index of which each image is signed too is checked by cosign as the index", async () => {
    for (const form of ["bundle", "signature under a tag"] as const) {
      const registry = await startReferrersRegistry();
      const name = `${registry.host}/team/app:1.0`;
      await pushIndex(index, name);
      for (const { digest } of [...index.children, index])
        await signWithCosign(`${registry.host}/team/app@${digest}`, keys.key, form);
      const tar = join(interopFolder("tar"), "app.tar");
      await imgpull([name, tar, "--signed-by", keys.pub, ...HTTP, "--platform", "all"]);
      await registry.stop();
      await cosignVerify(keys.pub, "--local-image", await unpack(tar));
    }
  });

  for (const [kind, ...make] of [
    ["P-384", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
    ["RSA", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
    ["Ed25519", "genpkey", "-algorithm", "ed25519"],
  ] as const) {
    test(`what cosign signs with a ${kind} key`, async () => {
      const folder = interopFolder("keys");
      await run(["openssl", ...make, "-out", "key.pem"], { cwd: folder });
      const importing = ["cosign", "import-key-pair", "--key", "key.pem"];
      await run(importing, { cwd: folder, env: { COSIGN_PASSWORD: "" } });
      const [key, pub] = ["import-cosign.key", "import-cosign.pub"].map((name) =>
        join(folder, name),
      ) as [string, string];
      const registry = await startReferrersRegistry();
      for (const [tag, form] of [
        ["1.0", "bundle"],
        ["2.0", "signature under a tag"],
      ] as const) {
        const signed = makeImage({ seed: `${kind} ${tag}`, platform });
        const name = `${registry.host}/team/app:${tag}`;
        await pushImage(signed, name);
        await signWithCosign(`${registry.host}/team/app@${signed.digest}`, key, form);
        const pulling = [name, join(folder, `${tag}.tar`), "--signed-by", pub, ...HTTP];
        const { exitCode, stderr } = await runCommand(pulling);
        assert.equal(exitCode, kind === "Ed25519" ? 1 : 0, stderr);
        if (kind === "Ed25519") assert.match(stderr, /Ed25519 key is prehashed/);
      }
      await registry.stop();
    });
  }

  test("a folder is what cosign wants as it is", async () => {
    const registry = await startReferrersRegistry();
    const name = `${registry.host}/team/app:1.0`;
    await pushImage(image, name);
    await signWithCosign(`${registry.host}/team/app@${image.digest}`, keys.key, "bundle");
    const folder = `${interopFolder("layout")}/`;
    await imgpull([name, folder, "--signed-by", keys.pub, ...HTTP]);
    await registry.stop();
    await cosignVerify(keys.pub, "--local-image", folder);
  });

  test("nothing is fetched of what another key has signed, or nobody", async () => {
    const registry = await startRealRegistry();
    const name = `${registry.host}/team/app:1.0`;
    await pushImage(image, name);
    const tar = join(interopFolder("refused"), "app.tar");
    const pull = () => runCommand([name, tar, "--signed-by", keys.pub, ...HTTP]);

    const unsigned = await pull();
    assert.equal(unsigned.exitCode, 1);
    assert.match(unsigned.stderr, /no signature at all/);

    for (const form of ["bundle", "signature under a tag"] as const)
      await signWithCosign(`${registry.host}/team/app@${image.digest}`, strangers.key, form);
    const stranger = await pull();
    assert.equal(stranger.exitCode, 1);
    assert.match(stranger.stderr, /2 signatures made by another key/);
    await registry.stop();
    for (const { digest } of image.layers)
      assert(!registry.log().includes(`"GET /v2/team/app/blobs/${digest}`));
  });
});

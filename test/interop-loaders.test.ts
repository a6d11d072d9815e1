// What the tars are for: real images, made, pushed and served by other people's programs, are
// pulled by the built command and loaded by every runtime at hand, with a look at the files, the
// config digest and the manifest digest.
import assert from "node:assert/strict";
import {
  chmodSync,
  cpSync,
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { arch } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { makeAuthority } from "./support/certificates.ts";
import { runCommand, SECRETS, USER } from "./support/command.ts";
import { digestOf } from "./support/image.ts";
import {
  type Containerd,
  type Docker,
  HOST_ARCHITECTURE,
  imgpull,
  interopFolder,
  makePodman,
  makeUmociImage,
  manifestDigestInContainerd,
  type RealRegistry,
  run,
  type StoredManifest,
  skipWithout,
  skopeo,
  startContainerd,
  startDocker,
  startNginx,
  startRealRegistry,
  storedManifest,
  takeFromContainerd,
  takeFromDocker,
  treeOf,
} from "./support/interop.ts";

const skip = skipWithout(
  "docker-registry",
  "dockerd",
  "docker",
  "containerd",
  "ctr",
  "podman",
  "skopeo",
  "umoci",
  "nginx",
  "htpasswd",
  "bash",
  "tar",
);

// ====== Real images ======

const ESBUILD = `node_modules/@esbuild/${process.platform}-${arch()}/bin/esbuild`;

type Change = (rootfs: string) => void;

function write(rootfs: string, path: string, content: string): void {
  const full = join(rootfs, path);
  mkdirSync(join(full, ".."), { recursive: true });
  writeFileSync(full, content);
}

/**
 * Three layers: many files and links, one large file, and one that changes what the first holds.
 */
const APP_LAYERS: Change[] = [
  (rootfs) => {
    cpSync("node_modules/@types/node", join(rootfs, "usr/lib/types"), { recursive: true });
    write(rootfs, "etc/release", "one\n");
    write(rootfs, "var/removed", "removed by a later layer\n");
    write(rootfs, "usr/bin/tool", "#!/bin/sh\n");
    chmodSync(join(rootfs, "usr/bin/tool"), 0o4755);
    linkSync(join(rootfs, "usr/bin/tool"), join(rootfs, "usr/bin/same-tool"));
    symlinkSync("types/index.d.ts", join(rootfs, "usr/lib/index.d.ts"));
  },
  (rootfs) => cpSync(ESBUILD, join(rootfs, "usr/bin/esbuild")),
  (rootfs) => {
    write(rootfs, "etc/release", "three\n");
    write(rootfs, `var/${"long-name/".repeat(12)}naïve ☃.txt`, "PAX\n");
  },
];

const removeFile: Change = (rootfs) => rmSync(join(rootfs, "var/removed"));

/** What is looked for in the root file system of a loaded image. */
interface Contents {
  tree: Map<string, string>;
  removed: string[];
}

interface Shelf {
  registry: RealRegistry;
  contents: Record<"docker" | "oci" | "amd64" | "arm64", Contents>;
}

/**
 * Built by umoci, pushed by skopeo, as OCI and as Docker schema 2; the indexes are podman's and
 * docker's.
 */
async function stockOci(
  host: string,
  docker: Docker,
): Promise<Pick<Shelf["contents"], "oci" | "amd64" | "arm64">> {
  const layout = join(interopFolder("images"), "layout");
  const push = (tag: string, repository: string, ...options: string[]) =>
    skopeo(
      "copy",
      "--dest-tls-verify=false",
      ...options,
      `oci:${layout}:${tag}`,
      `docker://${host}/${repository}`,
    );
  const contentsOf = (rootfs: string, ...removed: string[]): Contents => ({
    tree: treeOf(rootfs),
    removed,
  });

  const app = await makeUmociImage({ layout, tag: "app", layers: [...APP_LAYERS, removeFile] });
  await push("app", "oci/app:v1");
  await makeUmociImage({
    layout,
    tag: "base",
    layers: [(rootfs) => write(rootfs, "etc/base", "shared\n")],
  });
  const platforms: Partial<Record<"amd64" | "arm64", Contents>> = {};
  for (const architecture of ["amd64", "arm64"] as const) {
    const layers: Change[] = [(rootfs) => write(rootfs, "etc/architecture", `${architecture}\n`)];
    platforms[architecture] = contentsOf(
      await makeUmociImage({ layout, tag: architecture, base: "base", architecture, layers }),
    );
    await push(architecture, `oci/multi:${architecture}`);
    await push(architecture, `docker/multi:${architecture}`, "--format", "v2s2");
  }
  const podman = makePodman();
  await podman("manifest", "create", "multi");
  for (const tag of ["amd64", "arm64"]) {
    await podman(
      "manifest",
      "add",
      "--tls-verify=false",
      "multi",
      `docker://${host}/oci/multi:${tag}`,
    );
  }
  await podman(
    "manifest",
    "push",
    "--tls-verify=false",
    "--all",
    "multi",
    `docker://${host}/oci/multi:v1`,
  );
  const list = `${host}/docker/multi`;
  await docker.docker(
    "manifest",
    "create",
    "--insecure",
    `${list}:v1`,
    `${list}:amd64`,
    `${list}:arm64`,
  );
  await docker.docker("manifest", "push", "--insecure", `${list}:v1`);
  const { amd64, arm64 } = platforms;
  assert(amd64 && arm64);
  return { oci: contentsOf(app, "var/removed"), amd64, arm64 };
}

/**
 * Built and pushed by dockerd, which is then emptied, so that what it loads later comes out of the
 * tar.
 */
async function stockDocker(host: string, docker: Docker): Promise<Contents> {
  const context = interopFolder("build");
  const tree = new Map<string, string>();
  const steps = ["FROM scratch", 'CMD ["/usr/bin/esbuild"]'];
  for (const [index, change] of APP_LAYERS.entries()) {
    const layer = interopFolder("layer");
    change(layer);
    for (const [path, what] of treeOf(layer)) tree.set(path, what);
    // COPY would drop the setuid bit.
    await run(["tar", "-cf", join(context, `layer${index}.tar`), "-C", layer, "."]);
    steps.push(`ADD layer${index}.tar /`);
  }
  writeFileSync(join(context, "Dockerfile"), `${steps.join("\n")}\n`);
  const name = `${host}/docker/app:v1`;
  await docker.docker("build", "--tag", name, context);
  await docker.docker("push", name);
  await docker.docker("image", "prune", "--all", "--force");
  assert.equal(await docker.docker("image", "ls", "--all", "--quiet"), "");
  return { tree, removed: [] };
}

// ====== Cases ======

interface Case {
  name: string;
  repository: string;
  contents: keyof Shelf["contents"];
  platform?: string;
}

const CASES: Case[] = [
  { name: "a Docker schema 2 image", repository: "docker/app", contents: "docker" },
  { name: "an OCI image", repository: "oci/app", contents: "oci" },
  {
    name: "one platform of an OCI index",
    repository: "oci/multi",
    contents: "arm64",
    platform: "linux/arm64",
  },
  {
    name: "one platform of a Docker list",
    repository: "docker/multi",
    contents: "amd64",
    platform: "linux/amd64",
  },
  { name: "a whole OCI index", repository: "oci/multi", contents: "amd64", platform: "all" },
  { name: "a whole Docker list", repository: "docker/multi", contents: "amd64", platform: "all" },
];

interface Pulled {
  tar: string;
  /** As manifest.json and index.json name it. */
  name: string;
  /** What index.json points at, and the image that a loader without indexes takes. */
  entry: StoredManifest;
  image: StoredManifest;
  contents: Contents;
}

function configDigestOf(manifest: StoredManifest): string {
  return (manifest.json.config as { digest: string }).digest;
}

/** The manifests that a case is about, as the registry has them. */
async function expectedManifests(
  host: string,
  wanted: Case,
): Promise<Pick<Pulled, "entry" | "image">> {
  const top = await storedManifest(host, wanted.repository, "v1");
  if (wanted.platform === undefined) return { entry: top, image: top };
  const children = top.json.manifests as {
    digest: string;
    platform: { architecture: string };
  }[];
  const child = children.find(({ platform }) => platform.architecture === wanted.contents);
  assert(child, `no ${wanted.contents} in ${top.bytes}`);
  const image = await storedManifest(host, wanted.repository, child.digest);
  return { entry: wanted.platform === "all" ? top : image, image };
}

async function pull(shelf: Shelf, wanted: Case): Promise<Pulled> {
  const { host } = shelf.registry;
  const name = `${host}/${wanted.repository}:v1`;
  const manifests = await expectedManifests(host, wanted);
  const tar = join(interopFolder("pulled"), "image.tar");
  const platform = wanted.platform === undefined ? [] : ["--platform", wanted.platform];
  const line = await imgpull([name, tar, "--scheme", "http", ...platform]);
  assert.equal(line, `${name}@${manifests.entry.digest}\n`);
  return { tar, name, ...manifests, contents: shelf.contents[wanted.contents] };
}

// ====== Loaders ======

/** What a loader made of a tar: undefined is what it does not keep. */
interface Loaded {
  rootfs: string;
  configDigest: string;
  manifestDigest: string | undefined;
}

async function loadWithDocker(docker: Docker, pulled: Pulled): Promise<Loaded> {
  assert.equal(
    await docker.docker("load", "--input", pulled.tar),
    `Loaded image: ${pulled.name}\n`,
  );
  const configDigest = (
    await docker.docker("image", "inspect", "--format", "{{.Id}}", pulled.name)
  ).trim();
  return {
    rootfs: await takeFromDocker(docker, pulled.name),
    configDigest,
    manifestDigest: undefined,
  };
}

async function loadWithPodman(pulled: Pulled): Promise<Loaded> {
  const podman = makePodman();
  assert.equal(await podman("load", "--input", pulled.tar), `Loaded image: ${pulled.name}\n`);
  const format = ["--format", "{{.Id}} {{.Digest}}"];
  const [id, manifestDigest] = (await podman("image", "inspect", ...format, pulled.name))
    .trim()
    .split(" ");
  // With the vfs driver this is a plain folder, not a mount.
  const rootfs = (await podman("image", "mount", pulled.name)).trim();
  return { rootfs, configDigest: `sha256:${id}`, manifestDigest };
}

function architectureOf(config: string): string {
  return (JSON.parse(config) as { architecture: string }).architecture;
}

async function loadWithContainerd(containerd: Containerd, pulled: Pulled): Promise<Loaded> {
  const ctr = (...args: string[]) => containerd.ctr(...args);
  await ctr("images", "import", "--snapshotter", "native", pulled.tar);
  const manifestDigest = await manifestDigestInContainerd(containerd, pulled.name);
  assert.equal(await ctr("content", "get", pulled.entry.digest), pulled.entry.bytes.toString());
  const manifest = JSON.parse(await ctr("content", "get", pulled.image.digest)) as {
    config: { digest: string };
  };
  const configDigest = manifest.config.digest;
  const architecture = architectureOf(await ctr("content", "get", configDigest));
  return {
    rootfs: await takeFromContainerd(containerd, pulled.name, architecture),
    configDigest,
    manifestDigest,
  };
}

async function unpackWithUmoci(source: string): Promise<string> {
  const folder = interopFolder("umoci-unpack");
  await skopeo("copy", source, `oci:${folder}/layout:image`);
  await run(["umoci", "unpack", "--image", `${folder}/layout:image`, `${folder}/bundle`]);
  return `${folder}/bundle/rootfs`;
}

async function copyDockerArchive({ tar }: Pulled): Promise<Loaded> {
  const made = JSON.parse(await skopeo("inspect", "--raw", `docker-archive:${tar}`)) as {
    config: { digest: string };
  };
  const rootfs = await unpackWithUmoci(`docker-archive:${tar}`);
  return { rootfs, configDigest: made.config.digest, manifestDigest: undefined };
}

async function copyOciArchive(pulled: Pulled): Promise<Loaded> {
  const { entry, image, tar } = pulled;
  const folder = join(interopFolder("skopeo"), "copied");
  await skopeo("copy", "--all", "--preserve-digests", `oci-archive:${tar}`, `dir:${folder}`);
  const top = readFileSync(join(folder, "manifest.json"));
  const child =
    entry === image ? "manifest.json" : `${image.digest.slice("sha256:".length)}.manifest.json`;
  const manifest = JSON.parse(readFileSync(join(folder, child), "utf8")) as {
    config: { digest: string };
  };
  const config = readFileSync(join(folder, manifest.config.digest.slice("sha256:".length)));
  const layout = join(interopFolder("umoci-unpack"), "layout");
  const platform = ["--override-os", "linux", "--override-arch", architectureOf(config.toString())];
  await skopeo(...platform, "copy", `dir:${folder}`, `oci:${layout}:image`);
  await run(["umoci", "unpack", "--image", `${layout}:image`, `${layout}-bundle`]);
  return {
    rootfs: `${layout}-bundle/rootfs`,
    configDigest: digestOf(config),
    manifestDigest: digestOf(top),
  };
}

/**
 * Every path that the image was made of, with its kind, mode and content; runtimes may add their
 * mount points.
 */
function assertContents(rootfs: string, { tree, removed }: Contents): void {
  const actual = treeOf(rootfs);
  const found = new Map([...tree.keys()].map((path) => [path, actual.get(path)]));
  assert.deepEqual(found, tree);
  for (const path of removed) assert(!actual.has(path), `${path} was removed by a layer`);
}

// ====== Tests ======

describe("interop", { skip }, () => {
  let shelf: Shelf;
  let containerd: Containerd;
  let docker: Docker;

  before(async () => {
    const registry = await startRealRegistry();
    containerd = await startContainerd();
    docker = await startDocker(containerd);
    const contents = {
      ...(await stockOci(registry.host, docker)),
      docker: await stockDocker(registry.host, docker),
    };
    shelf = { registry, contents };
  });

  after(async () => {
    await docker?.stop();
    await containerd?.stop();
    await shelf?.registry.stop();
  });

  const loaders: Record<string, (pulled: Pulled) => Promise<Loaded>> = {
    "docker load": (pulled) => loadWithDocker(docker, pulled),
    "podman load": loadWithPodman,
    "ctr images import": (pulled) => loadWithContainerd(containerd, pulled),
    "skopeo copy docker-archive:": copyDockerArchive,
    "skopeo copy oci-archive:": copyOciArchive,
  };

  for (const wanted of CASES) {
    test(wanted.name, async (t) => {
      const pulled = await pull(shelf, wanted);
      for (const [name, load] of Object.entries(loaders)) {
        await t.test(name, async () => {
          const loaded = await load(pulled);
          assert.equal(loaded.configDigest, configDigestOf(pulled.image));
          if (loaded.manifestDigest !== undefined)
            assert.equal(loaded.manifestDigest, pulled.entry.digest);
          assertContents(loaded.rootfs, pulled.contents);
        });
      }
    });
  }

  test("several images in one tar load with every name", async () => {
    const { host } = shelf.registry;
    const names = [`${host}/docker/app:v1`, `${host}/oci/app:v1`];
    const tar = join(interopFolder("pulled"), "bundle.tar");
    const manifests = [
      await storedManifest(host, "docker/app", "v1"),
      await storedManifest(host, "oci/app", "v1"),
    ];
    const lines = await imgpull([...names, tar, "--scheme", "http"]);
    assert.equal(
      lines,
      names.map((name, index) => `${name}@${manifests[index]?.digest}\n`).join(""),
    );

    const loadedLines = names.map((name) => `Loaded image: ${name}\n`).join("");
    assert.equal(await docker.docker("load", "--input", tar), loadedLines);
    const podman = makePodman();
    assert.equal(await podman("load", "--input", tar), loadedLines);
    await containerd.ctr("images", "import", "--snapshotter", "native", tar);
    for (const [index, name] of names.entries()) {
      const [manifest, contents] = [
        manifests[index],
        index === 0 ? shelf.contents.docker : shelf.contents.oci,
      ];
      assert(manifest);
      const id = await docker.docker("image", "inspect", "--format", "{{.Id}}", name);
      assert.equal(id.trim(), configDigestOf(manifest));
      assertContents(await takeFromDocker(docker, name), contents);
      assertContents((await podman("image", "mount", name)).trim(), contents);
      assert.equal(await manifestDigestInContainerd(containerd, name), manifest.digest);
      await containerd.ctr("images", "rm", "--sync", name);
      assertContents(await unpackWithUmoci(`docker-archive:${tar}:${name}`), contents);
    }
    // By name, skopeo finds only OCI manifests in an OCI archive; Docker's it takes where it is the
    // only one.
    const copied = join(interopFolder("skopeo"), "copied");
    await skopeo("copy", "--preserve-digests", `oci-archive:${tar}:${names[1]}`, `dir:${copied}`);
    assert.equal(digestOf(readFileSync(join(copied, "manifest.json"))), manifests[1]?.digest);
  });

  test("an image pulled by digest alone loads, without a tag", async () => {
    const { host } = shelf.registry;
    const manifest = await storedManifest(host, "oci/app", "v1");
    const name = `${host}/oci/app@${manifest.digest}`;
    const tar = join(interopFolder("pulled"), "image.tar");
    assert.equal(await imgpull([name, tar, "--scheme", "http"]), `${name}\n`);

    const id = configDigestOf(manifest);
    assert.equal(await docker.docker("load", "--input", tar), `Loaded image ID: ${id}\n`);
    assertContents(await takeFromDocker(docker, id), shelf.contents.oci);
    const podman = makePodman();
    await podman("load", "--input", tar);
    assertContents(
      (await podman("image", "mount", id.slice("sha256:".length))).trim(),
      shelf.contents.oci,
    );
    const loaded = await loadWithContainerd(containerd, {
      tar,
      name,
      entry: manifest,
      image: manifest,
      contents: shelf.contents.oci,
    });
    assert.equal(loaded.manifestDigest, manifest.digest);
    assertContents(loaded.rootfs, shelf.contents.oci);
  });

  test("a tar on stdout goes straight into docker load, podman load and ctr images import", async () => {
    const { host } = shelf.registry;
    const name = `${host}/docker/app:v1`;
    const manifest = await storedManifest(host, "docker/app", "v1");
    const command = `"${process.execPath}" dist/imgpull.cjs ${name} - --scheme http`;
    const pipe = (loader: string) =>
      run(["bash", "-o", "pipefail", "-c", `${command} | ${loader}`], {
        cwd: process.cwd(),
        env: docker.environment,
      });

    assert.equal(await pipe("docker load"), `Loaded image: ${name}\n`);
    assertContents(await takeFromDocker(docker, name), shelf.contents.docker);
    const podman = makePodman();
    assert.equal(await pipe(podman.command("load").join(" ")), `Loaded image: ${name}\n`);
    assertContents((await podman("image", "mount", name)).trim(), shelf.contents.docker);
    await pipe(`ctr --address ${containerd.address} images import --snapshotter native -`);
    assert.equal(await manifestDigestInContainerd(containerd, name), manifest.digest);
    assertContents(
      await takeFromContainerd(containerd, name, HOST_ARCHITECTURE),
      shelf.contents.docker,
    );
  });

  test("a folder is an OCI layout that skopeo and umoci read, and that takes a second image", async () => {
    const { host } = shelf.registry;
    const layout = join(interopFolder("pulled"), "layout");
    for (const repository of ["docker/app", "oci/app"]) {
      await imgpull([`${host}/${repository}:v1`, `${layout}/`, "--scheme", "http"]);
    }
    const name = `${host}/oci/app:v1`;
    const manifest = await storedManifest(host, "oci/app", "v1");
    assert.equal(
      digestOf(await skopeo("inspect", "--raw", `oci:${layout}:${name}`)),
      manifest.digest,
    );
    const bundle = join(interopFolder("umoci-unpack"), "bundle");
    await run(["umoci", "unpack", "--image", `${layout}:${name}`, bundle]);
    assertContents(join(bundle, "rootfs"), shelf.contents.oci);
  });

  test("two pulls of one image, and one of the line that was printed, are byte-identical", async () => {
    const folder = interopFolder("pulled");
    const { host } = shelf.registry;
    const name = `${host}/oci/multi:v1`;
    const options = ["--scheme", "http", "--platform", "linux/arm64"];
    const first = await imgpull([name, `${folder}/1.tar`, ...options]);
    await imgpull([name, `${folder}/2.tar`, ...options, "--concurrency", "1"]);
    await imgpull([first.trim(), `${folder}/3.tar`, ...options]);
    const digests = ["1.tar", "2.tar", "3.tar"].map((name) =>
      digestOf(readFileSync(join(folder, name))),
    );
    assert.deepEqual(digests, Array<string | undefined>(3).fill(digests[0]));
    assert.deepEqual(readdirSync(folder).sort(), ["1.tar", "2.tar", "3.tar"]);
  });

  test("a registry with its own CA, a password and client certificates", async (t) => {
    const authority = makeAuthority();
    const folder = interopFolder("certificates");
    const client = authority.issueClient();
    const files = { "ca.pem": authority.cert, "cert.pem": client.cert, "key.pem": client.key };
    for (const [name, text] of Object.entries(files)) writeFileSync(join(folder, name), text);
    const secured = {
      htpasswd: { user: USER, password: SECRETS.password },
      tls: { ...authority.issueServer(), clientCa: authority.cert },
    };
    const registry = await startRealRegistry({ ...secured, storage: shelf.registry.storage });
    t.after(() => registry.stop());
    const nginx = await startNginx({
      ...secured,
      upstream: `http://127.0.0.1:${shelf.registry.port}`,
    });
    t.after(() => nginx.stop());
    const manifest = await storedManifest(shelf.registry.host, "docker/app", "v1");
    for (const host of [registry.host, nginx.host]) {
      const tar = join(interopFolder("pulled"), "image.tar");
      const trust = [
        "--cacert",
        `${folder}/ca.pem`,
        "--cert",
        `${folder}/cert.pem`,
        "--key",
        `${folder}/key.pem`,
      ];
      const account = ["--user", USER, "--password-stdin"];
      const name = `${host}/docker/app:v1`;
      const line = await imgpull([name, tar, ...trust, ...account], {
        stdin: `${SECRETS.password}\n`,
      });
      assert.equal(line, `${name}@${manifest.digest}\n`);
      assertContents(await unpackWithUmoci(`oci-archive:${tar}`), shelf.contents.docker);
      const refused = await runCommand([
        name,
        `${tar}.refused`,
        ...trust,
        "--user",
        USER,
        "--password",
        "wrong",
      ]);
      assert.equal(refused.exitCode, 1, refused.stderr);
      assert.match(refused.stderr, /401/);
      assert(!existsSync(`${tar}.refused`));
    }
  });
});

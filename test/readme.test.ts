// The front page: what it says of options is the option table, each of its command blocks is run,
// each message that it explains is one that the program gives.
import assert from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { once } from "node:events";
import { cpSync, existsSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { type AddressInfo, createServer as createTcpServer, type Server } from "node:net";
import { join, resolve } from "node:path";
import { after, before, describe, test } from "node:test";
import { createServer as createTlsServer } from "node:tls";
import { internals } from "../imgpull.ts";
import { type Entry, ociArchive, tarOf } from "./support/archives.ts";
import { makeAuthority } from "./support/certificates.ts";
import {
  type CommandOptions,
  runCommand,
  SECRETS,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import { digestOf, MEDIA, makeImage, makeManifest, makeMultiPlatform } from "./support/image.ts";
import { installedPackage } from "./support/package.ts";
import { makePayloadLayer, makeSignatureTag, makeSigner, sigTag } from "./support/proof.ts";
import { startProxy } from "./support/proxy.ts";
import { blobName, filesOf } from "./support/pull.ts";
import { IMAGES, LATEST, makeReader, type Reader, readmeBlocks } from "./support/readme.ts";
import {
  type Fault,
  type Registry,
  type RegistryOptions,
  startRegistry,
} from "./support/registry.ts";
import { speedPicture } from "./support/speed.ts";

const readme = readFileSync("README.md", "utf8");

test("the options table has every option, in the program's own words", () => {
  const rows = internals.OPTIONS.map(({ name, short, value, help }) => {
    const forms = `${short ? `-${short}, ` : ""}--${name}${value ? ` ${value}` : ""}`;
    return `| \`${forms.replaceAll("|", "\\|")}\` | ${help.replaceAll("|", "\\|")} |`;
  });
  const table = readme.split("\n").filter((line) => /^\| `-/.test(line));
  assert.deepEqual(table, rows);
});

test("the files that it links to are there, and so are the headings", () => {
  const links = [...readme.matchAll(/\]\((?!https?:)([^)#]+)\)/g)].map(([, link = ""]) => link);
  assert.ok(links.length > 3);
  for (const link of links) assert.ok(existsSync(link), link);
  const titles = [...readme.matchAll(/^#+ (.*)$/gm)].map(([, title = ""]) => title);
  const headings = titles.map((title) => title.toLowerCase().replaceAll(" ", "-"));
  for (const [, anchor = ""] of readme.matchAll(/\]\(#([^)]+)\)/g))
    assert.ok(headings.includes(anchor), anchor);
});

test("the environment table has every variable that the module names", () => {
  const header = readFileSync("imgpull.ts", "utf8").split("*/")[0] ?? "";
  const [, named = ""] =
    /Every environment variable that is read:([\s\S]*?)\n \*\n/.exec(header) ?? [];
  const variables = named.match(/\b[A-Z][A-Z_]+\b/g) ?? [];
  assert.ok(variables.length >= 14);
  const [, section = ""] = readme.split("## Environment variables");
  const table = section.split("\n## ")[0] ?? "";
  assert.deepEqual(
    variables.filter((name) => !table.includes(`\`${name}\``)),
    [],
  );
});

// ====== The command blocks ======

type Name = "alpine:3.22" | "alpine:3.23" | "busybox:1.37" | "node-exporter" | "app" | "curl";
const CONTENT = {
  "alpine:3.22": IMAGES["docker.io"]["library/alpine:3.22"],
  "alpine:3.23": IMAGES["docker.io"]["library/alpine:3.23"],
  "busybox:1.37": IMAGES["docker.io"]["library/busybox:1.37"],
  "node-exporter": IMAGES["quay.io"]["prometheus/node-exporter:v1.8.2"],
  app: IMAGES["registry.corp.example"]["team/app:1.4"],
  curl: IMAGES["mirror.corp.example"]["curl/curl:8.10.1"],
};

/** A tar with these images, every blob right, under these names. */
function checkTar(tar: Buffer, images: Partial<Record<Name, string>>): void {
  const files = filesOf(tar);
  const { manifests } = JSON.parse(String(files.get("index.json")));
  const names = manifests.map(
    ({ annotations }: { annotations: Record<string, string> }) =>
      annotations["org.opencontainers.image.ref.name"],
  );
  // What has no name is the proof of those before it.
  assert.deepEqual(names.filter(Boolean), Object.values(images));
  for (const [at, name] of (Object.keys(images) as Name[]).entries()) {
    const content = CONTENT[name];
    const digests =
      "children" in content ? content.children.map(({ digest }) => digest) : [content.digest];
    assert.ok(digests.includes(manifests[at].digest), name);
  }
}

const read = ({ folder }: Reader, name: string): Buffer => readFileSync(join(folder, name));
const ALPINE = { "alpine:3.22": "docker.io/library/alpine:3.22" };
const EXPORTER = { "node-exporter": "quay.io/prometheus/node-exporter:v1.8.2" };
const hasAlpine = (reader: Reader): void => checkTar(read(reader, "alpine.tar"), ALPINE);
const hasCurl = (reader: Reader): void => {
  checkTar(read(reader, "curl.tar"), { curl: "quay.io/curl/curl:8.10.1" });
  const requests = reader.registries["mirror.corp.example"].manifestRequests();
  assert.ok(requests.length > 0 && requests.every(({ query }) => query.get("ns") === "quay.io"));
};
const BUNDLE = "imgpull alpine:3.22 quay.io/prometheus/node-exporter:v1.8.2 bundle.tar";

/** What has to be there before, and what is there when it has run. */
interface Case {
  given?: (reader: Reader) => unknown;
  gives: (reader: Reader, stdout: string) => unknown;
}

/** Blocks by their first line. */
const RUN: Record<string, Case> = {
  "node dist/imgpull.cjs alpine:3.22 alpine.tar": {
    given: ({ folder }) => cpSync("dist", join(folder, "dist"), { recursive: true }),
    gives: hasAlpine,
  },
  "npm run demo": {
    given: ({ folder }) => {
      for (const name of [
        "build.mjs",
        "package.json",
        "CHANGELOG.md",
        "imgpull.ts",
        "test",
        "dist",
      ]) {
        cpSync(name, join(folder, name), {
          recursive: true,
          filter: (path) => path !== join("dist", "bin"),
        });
      }
      symlinkSync(resolve("node_modules"), join(folder, "node_modules"));
    },
    gives: (reader, stdout) => {
      assert.match(stdout, /^The tar:$/m);
      assert.equal(filesOf(read(reader, "build/demo/hello.tar")).size, 7);
      // The figure of the tar is this one; only index.json's size is the port's.
      const figure = readmeBlocks("text")[0]?.text ?? "";
      const [, listed = ""] = /^The tar:\n.*\n([\s\S]*?) {2}in all/m.exec(stdout) ?? [];
      const rows = listed
        .trimEnd()
        .split("\n")
        .map((row) => row.trim().split(/ +/));
      assert.equal(rows.length, 9);
      for (const [name = "", offset, size = ""] of rows) {
        const shown = name.replace(/^blobs\/sha256\/(.{12}).*/, "$1");
        assert.match(
          figure,
          new RegExp(`^ *${offset} +${name === "index.json" ? "\\d+" : size} .*${shown}`, "m"),
        );
      }
      assert.match(readme, new RegExp(`of ${/in all ([\d,]+) bytes/.exec(stdout)?.[1]} bytes`));
    },
  },
  "curl -fsSL LATEST/imgpull-linux-x64.tar.gz | tar -xz": {
    gives: (reader) => {
      hasAlpine(reader);
      assert.deepEqual(reader.calls(), ["docker load -i alpine.tar"]);
    },
  },
  "curl -fsSL --remote-name-all LATEST/{imgpull-linux-x64.tar.gz,SHA256SUMS}": {
    gives: (reader, stdout) => {
      assert.match(stdout, /^imgpull-linux-x64\.tar\.gz: OK$/m);
      hasAlpine(reader);
    },
  },
  "curl -fsSLo imgpull LATEST/imgpull.cjs": { gives: hasAlpine },
  "set -o pipefail": { gives: hasAlpine },
  "npm install --global imgpull": {
    gives: (reader) => {
      assert.ok(existsSync(join(reader.folder, "../global/bin/imgpull")));
      hasAlpine(reader);
    },
  },
  "imgpull alpine:3.22 alpine.tar && docker load -i alpine.tar": {
    gives: (reader) => {
      hasAlpine(reader);
      assert.deepEqual(reader.calls(), [
        "docker load -i alpine.tar",
        "docker load",
        "ssh pi podman load",
      ]);
      for (const program of ["docker", "ssh"]) checkTar(reader.stdinOf(program), ALPINE);
      const { manifests } = JSON.parse(String(read(reader, "layout/index.json")));
      assert.equal(manifests.length, 1);
    },
  },
  [BUNDLE]: { gives: (reader) => checkTar(read(reader, "bundle.tar"), { ...ALPINE, ...EXPORTER }) },
  "imgpull --verify bundle.tar": {
    given: ({ run }) => run(BUNDLE),
    gives: ({ calls }) => assert.deepEqual(calls(), ["docker load -i bundle.tar"]),
  },
  "imgpull alpine:3.23 delta.tar --since bundle.tar": {
    given: ({ run }) => run(BUNDLE),
    gives: (reader) => {
      checkTar(read(reader, "delta.tar"), { "alpine:3.23": "docker.io/library/alpine:3.23" });
      checkTar(read(reader, "next.tar"), {
        "alpine:3.23": "docker.io/library/alpine:3.23",
        "busybox:1.37": "docker.io/library/busybox:1.37",
      });
    },
  },
  "imgpull registry.corp.example:5000/team/app:1.4 app.tar \\": {
    gives: (reader) =>
      checkTar(read(reader, "app.tar"), { app: "registry.corp.example:5000/team/app:1.4" }),
  },
  "imgpull mirror.corp.example/curl/curl:8.10.1 curl.tar --ns quay.io": { gives: hasCurl },
  "imgpull quay.io/curl/curl:8.10.1 curl.tar --mirror quay.io=mirror.corp.example": {
    gives: hasCurl,
  },
  // Signed here as cosign does; that cosign agrees is in interop-proof.test.ts.
  "cosign sign --key cosign.key quay.io/org/app:1.4": {
    given: ({ folder, registries }) => {
      const signer = makeSigner("P-256");
      const image = IMAGES["quay.io"]["org/app:1.4"];
      const signature = makeSignatureTag(makePayloadLayer(image, signer));
      registries["quay.io"].add(signature, "org/app", sigTag(image));
      writeFileSync(join(folder, "cosign.pub"), signer.pem);
    },
    gives: (reader, stdout) => {
      assert.match(stdout, /all is right, and signed by a key given/);
      assert.ok(existsSync(join(reader.folder, "app/index.json")));
      assert.deepEqual(
        reader.calls().map((call) => call.split(" ", 2).join(" ")),
        ["cosign sign", "cosign verify"],
      );
    },
  },
  "oras cp -r --from-oci-layout-path app.tar quay.io/org/app:1.4 registry.there.example/org/app:1.4":
    { gives: (reader) => assert.equal(reader.calls().length, 1) },
  "imgpull --list-tar bundle.tar | jq -r .name | while read -r name; do": {
    given: ({ run }) => run(BUNDLE),
    gives: (reader) =>
      assert.deepEqual(
        reader.calls(),
        Object.values({ ...ALPINE, ...EXPORTER }).map((name) => {
          const place = name.replace(/^[^/]*/, "registry.there.example");
          return `regctl image import --name ${name} ${place} bundle.tar`;
        }),
      ),
  },
  "imgpull --list-tar bundle.tar | jq -r .name | sort -u | while read -r name; do": {
    given: ({ run }) => run(BUNDLE),
    gives: (reader) =>
      assert.deepEqual(
        reader.calls(),
        Object.values({ ...ALPINE, ...EXPORTER }).map((name) => {
          const place = name.replace(/^[^/]*/, "registry.there.example");
          return `oras cp --from-oci-layout-path bundle.tar ${name} ${place}`;
        }),
      ),
  },
  "imgpull alpine:3.22 busybox:1.37 - | split -b 4G - bundle.tar.": {
    gives: (reader, stdout) => {
      assert.match(stdout, /^-: 2 images, .*: all is right\nloads in docker, podman, ctr/);
      const images = { ...ALPINE, "busybox:1.37": "docker.io/library/busybox:1.37" };
      checkTar(reader.stdinOf("docker"), images);
    },
  },
  "imgpull alpine:3.22 busybox:1.37 tools.tar > images.lock": {
    gives: (reader) => {
      checkTar(read(reader, "tools.tar"), {
        ...ALPINE,
        "busybox:1.37": "docker.io/library/busybox:1.37",
      });
      const [first = "", second = ""] = String(read(reader, "images.lock")).split("\n");
      assert.match(first, /^docker\.io\/library\/alpine:3\.22@sha256:[0-9a-f]{64}$/);
      assert.match(second, /^docker\.io\/library\/busybox:1\.37@sha256:[0-9a-f]{64}$/);
    },
  },
  "imgpull --from images.txt --dry-run | diff images.lock -": {
    given: async ({ folder, run, env }) => {
      writeFileSync(join(folder, "images.txt"), "alpine:3.22\nbusybox:1.37\n");
      await run("imgpull --from images.txt tools.tar > images.lock");
      writeFileSync(join(env.STAND_INS ?? "", "helm.stdout"), CHART);
    },
    gives: (reader) => {
      assert.deepEqual(reader.calls(), ["helm template ./chart"]);
      checkTar(read(reader, "chart.tar"), {
        "alpine:3.22": "registry.there.example/hub/library/alpine:3.22",
        ...EXPORTER,
      });
    },
  },
};

/** As helm prints a chart with two images. */
const CHART = `---
# Source: chart/templates/deployment.yaml
kind: Deployment
spec:
  template:
    spec:
      containers:
        - name: web
          image: "alpine:3.22"
        - {name: metrics, image: 'quay.io/prometheus/node-exporter:v1.8.2'}
`;

const NOT_RUN: Record<string, string> = {
  "npm cit": "it is what runs this test",
  "npm ci":
    "the rebuild of dist/ is in dist.test.ts, that of the binaries in the test of the binaries",
  "curl -fsSLO LATEST/imgpull.cjs": "it needs Node 26: node-versions.test.ts runs it",
};

describe("every command block", { concurrency: 2 }, () => {
  test("is run here, or listed with the reason why not", () => {
    const blocks = readmeBlocks("sh").map(({ firstLine }) => firstLine.replace(LATEST, "LATEST"));
    assert.deepEqual(blocks.sort(), [...Object.keys(RUN), ...Object.keys(NOT_RUN)].sort());
    const shells = [...readme.matchAll(/^```(\w*)$/gm)]
      .map(([, language = ""]) => language)
      .filter(Boolean);
    assert.deepEqual([...new Set(shells)].sort(), ["js", "powershell", "sh", "text", "yaml"]);
  });

  for (const { firstLine, text } of readmeBlocks("sh")) {
    const { given, gives } = RUN[firstLine.replace(LATEST, "LATEST")] ?? {};
    if (!gives) continue;
    test(firstLine, async (t) => {
      const reader = await makeReader(t);
      await given?.(reader);
      const { exitCode, stdout, stderr } = await reader.run(text);
      assert.equal(exitCode, 0, `${stdout}${stderr}`);
      await gives(reader, String(stdout));
      const left = readdirSync(reader.folder).filter((name) => name.includes(".partial"));
      assert.deepEqual(left, []);
    });
  }
});

/** The commands of a CI step: what `run: |` or `script:` has. */
function stepsOf(yaml: string): string {
  const [, block = ""] = /(?:run: \|\n|script:\n)((?: {4}.*\n?)+)/.exec(yaml) ?? [];
  return block.replace(/^ {4}(- )?/gm, "");
}

describe("the steps for CI", () => {
  for (const { firstLine, text } of readmeBlocks("yaml")) {
    const steps = stepsOf(text);

    test(`${firstLine} gives the image`, async (t) => {
      const reader = await makeReader(t);
      const { exitCode, stderr } = await reader.runStep(steps);
      assert.equal(exitCode, 0, stderr);
      hasAlpine(reader);
    });

    test(`${firstLine} is red without the script, or without the image`, async (t) => {
      const reader = await makeReader(t);
      const broken = [
        steps.replace(`${LATEST}/imgpull.cjs`, `${LATEST}/not-there.cjs`),
        steps.replace("alpine:3.22", "alpine:0.0"),
      ];
      for (const step of broken) {
        const { exitCode, stderr } = await reader.runStep(step);
        assert.notEqual(exitCode, 0, step);
        assert.match(stderr, /404|no such tag/);
        assert.ok(!existsSync(join(reader.folder, "alpine.tar")));
      }
    });
  }
});

test("the bars are those of the table", () => {
  assert.equal(readFileSync(".github/speed.svg", "utf8"), speedPicture(readme));
});

test("the owner is that of package.json", () => {
  const { repository, homepage, bugs } = JSON.parse(readFileSync("package.json", "utf8"));
  const [, owner = ""] = /github\.com\/([^/]+)\/imgpull/.exec(repository.url) ?? [];
  const texts = [readme, homepage, bugs.url];
  const owners = texts.flatMap((text) => [...text.matchAll(/github\.com\/([^/]+)\/imgpull/g)]);
  assert.ok(owners.length > 5);
  assert.deepEqual([...new Set(owners.map(([, name]) => name))], [owner]);
});

test("what --list-tar prints is described, field by field", async (t) => {
  const reader = await makeReader(t);
  const { stdout } = await reader.run(
    "imgpull -q alpine:3.22 a.tar > /dev/null; imgpull --list-tar a.tar",
  );
  const [line = ""] = String(stdout).split("\n");
  const listed = JSON.parse(line);
  const [, section = ""] = readme.split("### What --list-tar prints");
  const fields = [...(section.split("\n## ")[0] ?? "").matchAll(/^\| `(\w+)` \| (\w+) \|/gm)];
  assert.deepEqual(
    fields.map(([, name = "", type]) => [name, type]),
    Object.entries(listed).map(([name, value]) => [
      name,
      Array.isArray(value) ? "array" : typeof value,
    ]),
  );
  for (const name of Object.keys(listed.layers[0]))
    assert.ok(section.includes(`"${name}": `), name);
});

// ====== The library's programs ======

/** By their first line: what has to be there before, and what each prints. */
const PROGRAMS: Record<string, Case> = {
  "// One image into a tar.": {
    gives: (reader, stdout) => {
      const tar = read(reader, "hello-world.tar");
      filesOf(tar);
      assert.match(stdout, new RegExp(`^sha256:[0-9a-f]{64} linux/\\w+ ${tar.length}\n$`));
    },
  },
  "// A list of images into one tar, with a progress bar: imgpull --from images.txt bundle.tar > images.lock":
    {
      given: ({ folder }) => {
        const list = "alpine:3.22\nquay.io/prometheus/node-exporter:v1.8.2 # metrics\n";
        writeFileSync(join(folder, "images.txt"), list);
      },
      gives: async (reader, stdout) => {
        const tar = read(reader, "bundle.tar");
        checkTar(tar, { ...ALPINE, ...EXPORTER });
        const command = await reader.run("imgpull --from images.txt other.tar 2>/dev/null");
        assert.equal(String(command.stdout), stdout);
        assert.ok(read(reader, "other.tar").equals(tar));
      },
    },
  "// Straight into docker, without a file.": {
    gives: (reader) => {
      assert.deepEqual(reader.calls(), ["docker load"]);
      checkTar(reader.stdinOf("docker"), ALPINE);
    },
  },
  "// What a tar holds. openTar() reads the files in it, blobs by their digest.": {
    given: ({ run }) => run(BUNDLE),
    gives: (_reader, stdout) =>
      assert.match(
        stdout,
        /^docker\.io\/library\/alpine:3\.22 linux\/\w+ \d+ 1\nquay\.io\/.*:v1\.8\.2 linux\/\w+ \d+ 2\n$/,
      ),
  },
  "// A gate for CI: exit code 1, and each problem as a value.": {
    given: ({ run }) => run(BUNDLE),
    gives: async (reader, stdout) => {
      assert.match(stdout, /^2 images, for docker, podman, ctr, /);
      const tar = read(reader, "bundle.tar");
      const [name = "", bytes = Buffer.alloc(0)] = [...filesOf(tar)].at(-1) ?? [];
      tar.writeUInt8(bytes.readUInt8(9) ^ 1, tar.indexOf(bytes) + 9);
      writeFileSync(join(reader.folder, "bundle.tar"), tar);
      const { exitCode, stderr } = await reader.run("node program.?js");
      assert.deepEqual([exitCode, stderr], [1, `damaged ${name}\n`]);
    },
  },
  "// Which tags have moved since the lock file was written? Nothing is fetched but manifests.": {
    given: async ({ run, registries }) => {
      await run("imgpull alpine:3.22 busybox:1.37 tools.tar > images.lock");
      registries["docker.io"].add(CONTENT["alpine:3.23"], "library/alpine", "3.22");
    },
    gives: (reader, stdout) => {
      assert.match(stdout, /^moved: docker\.io\/library\/alpine:3\.22@sha256:[0-9a-f]{64}\n$/);
      assert.ok(!existsSync(join(reader.folder, "bundle.tar")));
    },
  },
};

/** The same program as a CommonJS file has it. */
function withRequire(program: string): string {
  const imports = /^import (\{.*\}) from ("[^"]+");$/gm;
  const body = program.replace(imports, "").trim();
  const required = Array.from(
    program.matchAll(imports),
    ([, names, module]) => `const ${names} = require(${module});\n`,
  );
  return `${required.join("")}(async () => {\n${body}\n})();\n`;
}

describe("every program of the library", { concurrency: 2 }, () => {
  const programs = readmeBlocks("js");
  test("is run here", () =>
    assert.deepEqual(
      programs.map(({ firstLine }) => firstLine),
      Object.keys(PROGRAMS),
    ));

  for (const { firstLine, text } of programs) {
    for (const [file, program] of [
      ["program.mjs", text],
      ["program.cjs", withRequire(text)],
    ] as const) {
      test(`${firstLine} ${file}`, async (t) => {
        const { given, gives } = PROGRAMS[firstLine] ?? assert.fail();
        const reader = await makeReader(t);
        const modules = join(await installedPackage(), "node_modules");
        cpSync(modules, join(reader.folder, "node_modules"), {
          recursive: true,
          verbatimSymlinks: true,
        });
        writeFileSync(join(reader.folder, file), program);
        await given?.(reader);
        const { exitCode, stdout, stderr } = await reader.run(`node ${file}`);
        assert.equal(exitCode, 0, stderr);
        assert.match(stderr, /^((\r\[#* *\])*\n)?$/);
        await gives(reader, String(stdout));
      });
    }
  }
});

// ====== The messages ======

const content = makeMultiPlatform(["linux/amd64", "linux/s390x"], {
  seed: "messages",
  layers: [5000],
});
const authority = makeAuthority();
const HTML = { status: 200, body: "<html>Log in</html>", headers: { "content-type": "text/html" } };

interface Message {
  serve?: RegistryOptions;
  prepare?: (registry: Registry) => unknown;
  /** In place of `REGISTRY/team/app:1.0` and of `app.tar`. */
  image?: (host: string) => string;
  dest?: string;
  /** Laid over { scheme: "http", platform: "linux/amd64", retries: "1" }. */
  options?: Record<string, string>;
  /** In place of all words of the command. */
  words?: string[];
  run?: (folder: string) => CommandOptions;
  exitCode?: number;
}

const SECURE = { scheme: "https", cacert: "ca.pem" };

/** A tar in which something happened to the first layer. */
function carry(folder: string, change: (layer: [string, Buffer]) => Entry[]): CommandOptions {
  const carried = makeImage({ seed: "carried", platform: "linux/amd64" });
  const [layer] = carried.layers;
  assert.ok(layer);
  const entries = ociArchive([carried]).flatMap((entry) =>
    entry[0] === blobName(layer.digest) ? change([entry[0], layer.bytes]) : [entry],
  );
  writeFileSync(join(folder, "carried.tar"), tarOf(entries));
  return {};
}

/** An authority, a client's certificate and key, and a key with a passphrase. */
function writePem(folder: string): CommandOptions {
  const { cert, key } = authority.issueClient();
  const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const locked = { type: "pkcs8", format: "pem", cipher: "aes-256-cbc", passphrase: "x" } as const;
  const texts = { "ca.pem": authority.cert, "me.cert": cert, "me.key": key };
  for (const [name, text] of Object.entries(texts)) writeFileSync(join(folder, name), text);
  writeFileSync(join(folder, "locked.key"), privateKey.export(locked));
  return {};
}

/** A body that never ends, a byte now and then. */
function trickle(_request: IncomingMessage, response: ServerResponse): void {
  response.writeHead(200);
  const timer = setInterval(() => response.write(" "), 20);
  response.once("close", () => clearInterval(timer));
}

const answerRaw = (text: string): Fault => ({
  handler: (_request, response) => {
    response.socket?.end(text);
  },
});

/** What makes the program say it, by the words as they stand in the table. */
const MESSAGES: Record<string, Message> = {
  // The test registry hangs up instead, which no real one does.
  "the server answers plain HTTP on this port": {
    image: () => `${plainHost}/app:1`,
    options: { scheme: "https" },
  },
  "this port is https: try without --scheme http": {
    prepare: (registry) =>
      registry.on({}, { status: 400, body: "Client sent an HTTP request to an HTTPS server.\n" }),
  },
  "its certificate authority is not known here": {
    serve: { tls: authority.issueServer() },
    options: { scheme: "https" },
  },
  "its certificate is not for … but for": {
    serve: { tls: authority.issueServer({ dns: ["registry.corp.example"], ip: [] }) },
    options: SECURE,
    run: writePem,
  },
  "has no certificate that can be read": {
    options: { ...SECURE, cacert: "me.key" },
    run: writePem,
  },
  "has a passphrase": {
    options: { ...SECURE, cert: "me.cert", key: "locked.key" },
    run: writePem,
  },
  "it may want a client certificate, one that it knows": {
    serve: { tls: { ...authority.issueServer(), clientCa: authority.cert } },
    options: SECURE,
    run: writePem,
  },
  "answered 401 … no credentials were found": { serve: { auth: "basic" } },
  "answered 401 … refused: the credentials of": {
    serve: { auth: "basic" },
    options: { user: USER, password: SECRETS.proxyPassword },
  },
  "the credentials of … are right, but may not pull": {
    serve: { auth: "bearer" },
    prepare: (registry) => registry.on({ kind: "manifest" }, { status: 403 }),
    options: { user: USER, password: SECRETS.password },
  },
  "the credentials of … were not sent: the registry asks for none of their kind": {
    prepare: (registry) => registry.on({ kind: "manifest" }, { status: 403 }),
    options: { user: USER, password: SECRETS.password },
  },
  "names the token endpoint … an address inside a network": {
    serve: { auth: { mode: "bearer", realm: "http://169.254.169.254/token" } },
  },
  "no such tag:": { image: (host) => `${host}/team/app:none` },
  "no such repository:": { image: (host) => `${host}/team/none:1.0` },
  "has no image for … it has:": { options: { platform: "linux/arm64" } },
  "no signature at all; but there may be one that is denied": {
    options: { "signed-by": "signer.pub" },
    prepare: (registry) => registry.on({ path: /manifests\/sha256-/ }, { status: 403 }),
    run: (folder) => {
      writeFileSync(join(folder, "signer.pub"), makeSigner("P-256").pem);
      return {};
    },
  },
  "too many requests: come back in … s, at": {
    prepare: (registry) =>
      registry.on({ kind: "manifest" }, { status: 429, headers: { "retry-after": "3600" } }),
  },
  "the disk is full, … are needed and … has … free": {
    prepare: (registry) => {
      const huge = makeImage({ seed: "huge", platform: "linux/amd64" });
      const layers = [{ mediaType: MEDIA.ociGzip, digest: digestOf("huge"), size: 8e15 }];
      const manifest = makeManifest(huge.mediaType, { ...huge.manifest, layers });
      registry.add({ ...manifest, blobs: huge.blobs, configs: huge.configs }, "team/app", "1.0");
    },
  },
  "is being pulled by another imgpull (process": {
    run: (folder) => {
      const lock = { pid: process.pid, host: "elsewhere.example", since: 1, id: 1 };
      writeFileSync(join(folder, "app.tar.partial.lock"), JSON.stringify(lock));
      return {};
    },
  },
  "is damaged": {
    run: (folder) => carry(folder, ([name, bytes]) => [[name, Buffer.alloc(bytes.length)]]),
    words: ["--verify", "carried.tar"],
  },
  "is missing (a tar made with --since needs its base)": {
    run: (folder) => carry(folder, () => []),
    words: ["--verify", "carried.tar"],
  },
  "the bytes have another digest, twice, from": {
    prepare: (registry) => registry.on({ kind: "layer" }, { corruptAt: 100 }),
  },
  "refused CONNECT … 407 … the proxy wants credentials": {
    image: () => "registry.corp.example/team/app:1.0",
    options: { scheme: "https" },
  },
  "the proxy … refused GET": {
    image: () => "registry.corp.example/team/app:1.0",
    options: { retries: "0" },
    run: () => ({ env: { HTTP_PROXY: `http://${addressOf(gateway)}` } }),
  },
  "it speaks TLS on this port": {
    image: () => "registry.corp.example/team/app:1.0",
    run: () => ({ env: { HTTP_PROXY: `http://${addressOf(tlsServer)}` } }),
  },
  "it speaks SOCKS on this port, which is not supported": {
    image: () => "registry.corp.example/team/app:1.0",
    run: () => ({ env: { HTTP_PROXY: `http://${addressOf(socksServer)}` } }),
  },
  "no such host": { image: () => "registry.invalid/team/app:1.0", options: { scheme: "https" } },
  "nothing came for … s": {
    prepare: (registry) => registry.on({ kind: "layer" }, { stallAfter: 10 }),
    options: { timeout: "0.2", retries: "0" },
  },
  "the answer was not whole after … s": {
    prepare: (registry) => registry.on({ kind: "manifest" }, { handler: trickle }),
    options: { timeout: "0.2", retries: "0" },
  },
  "bytes came in … s": {
    prepare: (registry) => registry.on({ kind: "layer" }, { handler: trickle }),
    options: { timeout: "0.2", retries: "0" },
  },
  "the answer tells its length twice": {
    prepare: (registry) =>
      registry.on(
        { kind: "manifest" },
        answerRaw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
      ),
  },
  "what answers there does not speak HTTP/1.1": {
    prepare: (registry) => registry.on({ kind: "manifest" }, answerRaw("SSH-2.0-OpenSSH_9.2\r\n")),
  },
  "cannot be run: it is not on the PATH": {
    serve: { auth: "basic" },
    run: () => ({ env: { DOCKER_AUTH_CONFIG: JSON.stringify({ credsStore: "not-installed" }) } }),
  },
  "is … a registry?": { prepare: (registry) => registry.on({ kind: "manifest" }, HTML) },
  "DEST is missing: … reads as an IMAGE": { dest: "busybox:1.37", exitCode: 2 },
  "not allowed by Node's permission model": {
    run: (folder) => {
      const [major = 0] = process.versions.node.split(".").map(Number);
      const model = major < 24 ? "--experimental-permission" : "--permission";
      const net = major < 25 ? [] : ["--allow-net"];
      return {
        nodeArgs: [model, ...net, "--allow-fs-read=*", `--allow-fs-write=${join(folder, "other")}`],
      };
    },
  },
};

const plainServer = createServer((_request, response) => response.end());
const gateway = createServer((_request, response) => response.writeHead(502).end());
const tlsServer = createTlsServer(authority.issueServer());
const socksServer = createTcpServer((socket) => {
  socket.on("error", () => {});
  socket.once("data", (bytes) => socket.end(bytes[0] === 5 ? Buffer.from([5, 0]) : ""));
});
const servers: Server[] = [plainServer, gateway, tlsServer, socksServer];
let plainHost = "";
before(async () => {
  for (const server of servers) await once(server.listen(0, "127.0.0.1"), "listening");
  plainHost = addressOf(plainServer);
});
after(() => {
  for (const server of servers) server.close();
  for (const server of [plainServer, gateway]) server.closeAllConnections();
});

function addressOf(server: Server): string {
  return `127.0.0.1:${(server.address() as AddressInfo).port}`;
}

describe("every message that is explained", { concurrency: 2 }, () => {
  const [, section = ""] = readme.split("## Troubleshooting");
  const [table = ""] = section.split("\n## ");
  const explained = [...table.matchAll(/^\| `([^`]+)` \|/gm)].map(([, words = ""]) => words);

  test("is among these", () => assert.deepEqual(explained, Object.keys(MESSAGES)));

  for (const explanation of explained) {
    const message = MESSAGES[explanation];
    if (!message) continue;
    test(explanation, async (t) => {
      const {
        serve,
        prepare,
        image = (host) => `${host}/team/app:1.0`,
        dest = "app.tar",
        exitCode = 1,
      } = message;
      const registry = await startRegistry(serve, t);
      registry.add(content, "team/app", "1.0");
      prepare?.(registry);
      const folder = temporaryFolder(t);
      const options = { scheme: "http", platform: "linux/amd64", retries: "1", ...message.options };
      const words = Object.entries(options).flatMap(([name, value]) => [`--${name}`, value]);
      const { env = {}, ...run } = message.run?.(folder) ?? {};
      // Only one case is for a proxy, which wants credentials.
      const proxy = explanation.includes("CONNECT")
        ? await startProxy(t, { hosts: {}, credentials: true })
        : undefined;
      const typed = message.words ?? [image(registry.host), dest, ...words];
      const result = await runCommand(typed, {
        cwd: folder,
        ...run,
        env: { ...env, ...(proxy && { HTTPS_PROXY: proxy.url }) },
      });
      assert.equal(result.exitCode, exitCode, result.stderr);
      const escaped = explanation
        .split("…")
        .map((part) => part.trim().replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
      assert.match(result.stderr, new RegExp(escaped.join("[\\s\\S]*")));
      assert.equal(existsSync(join(folder, "app.tar")), false);
    });
  }
});

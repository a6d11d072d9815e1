// The script on every line of Node that it promises: on stdin from a server, as a package, and on
// the newest one under Node's permission model.
import assert from "node:assert/strict";
import { cpSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { describe, type TestContext, test } from "node:test";
import { SECRETS } from "./support/command.ts";
import { NEWEST_NODE, NODE_VERSIONS, nodeExecutable, TOO_OLD_NODES } from "./support/nodes.ts";
import { installedPackage } from "./support/package.ts";
import { filesOf } from "./support/pull.ts";
import { IMAGES, makeReader, type Reader, readmeBlocks } from "./support/readme.ts";

/** A reader whose `node` is this one; undefined, and the test skipped, where it cannot be had. */
async function readerWith(t: TestContext, version: string): Promise<Reader | undefined> {
  const node = await nodeExecutable(version);
  if ("path" in node) return makeReader(t, node.path);
  t.skip(node.missing);
  return undefined;
}

function blockWith(words: string): string {
  const [block, ...others] = readmeBlocks("sh").filter(({ text }) => text.includes(words));
  assert.ok(block && others.length === 0, words);
  return block.text;
}

const ON_STDIN = blockWith("| node - ");
const PERMITTED = blockWith("--permission");
const children = IMAGES["docker.io"]["library/alpine:3.22"].children.map(({ digest }) => digest);
const tars = new Map<string, Buffer>();

/**
 * Exit code 0, the pinned reference, nothing but progress on stderr, and the same tar as on every
 * other Node.
 */
async function assertPulls(reader: Reader, text: string, warnings = /(?!)/): Promise<void> {
  const { exitCode, stdout, stderr } = await reader.run(text);
  assert.equal(exitCode, 0, stderr);
  const [, digest = ""] =
    /^docker\.io\/library\/alpine:3\.22@(sha256:[0-9a-f]{64})\n$/.exec(String(stdout)) ?? [];
  assert.ok(children.includes(digest), String(stdout));
  assert.deepEqual(
    stderr.split("\n").filter((line) => line && !/^imgpull: /.test(line) && !warnings.test(line)),
    [],
  );
  const tar = readFileSync(join(reader.folder, "alpine.tar"));
  filesOf(tar);
  tars.set(text, tars.get(text) ?? tar);
  assert.ok(tars.get(text)?.equals(tar));
}

for (const version of NODE_VERSIONS) {
  describe(`Node ${version}`, () => {
    test("curl | node -, as the README has it", async (t) => {
      const reader = await readerWith(t, version);
      if (!reader) return;
      assert.equal(String((await reader.run("node --version")).stdout), `v${version}\n`);
      await assertPulls(reader, ON_STDIN);
      const misused = await reader.run('curl -fsSL "$RELEASE/imgpull.cjs" | node - --frobnicate');
      assert.deepEqual(
        [misused.exitCode, misused.stderr.split("\n").length],
        [2, 2],
        misused.stderr,
      );
    });

    test("the package by import, by require() and as a command, without a warning", async (t) => {
      const reader = await readerWith(t, version);
      if (!reader) return;
      cpSync(join(await installedPackage(), "node_modules"), join(reader.folder, "node_modules"), {
        recursive: true,
        verbatimSymlinks: true,
      });
      const pulling =
        'new Puller("alpine:3.22").pullTar("library.tar").then(({ digest }) => console.log(digest));\n';
      const files = {
        "esm.mjs": `import { Puller } from "imgpull";\n${pulling}`,
        "commonjs.cjs": `const { Puller } = require("imgpull");\n${pulling}`,
      };
      for (const [name, text] of Object.entries(files)) {
        writeFileSync(join(reader.folder, name), text);
        const { exitCode, stdout, stderr } = await reader.run(`node ${name}`);
        assert.deepEqual([exitCode, stderr], [0, ""], name);
        assert.ok(children.includes(String(stdout).trim()), name);
      }
      await assertPulls(reader, "node_modules/.bin/imgpull alpine:3.22 alpine.tar");
    });
  });
}

for (const version of TOO_OLD_NODES) {
  test(`Node ${version}: one line says which is needed, as a script and by curl | node -`, async (t) => {
    const reader = await readerWith(t, version);
    if (!reader) return;
    const words = `imgpull: Node 20.19 or later is needed; this is v${version}\n`;
    const lines = [ON_STDIN, `node ${resolve("dist/imgpull.cjs")} --version`];
    for (const line of lines) {
      const { exitCode, stdout, stderr } = await reader.run(line);
      assert.deepEqual([exitCode, String(stdout), stderr], [1, "", words], line);
    }
  });
}

describe(`the permission model of Node ${NEWEST_NODE}`, () => {
  const warnings = /ExperimentalWarning: The flag --allow-net|--trace-warnings/;

  test("the README's line pulls a public image", async (t) => {
    const reader = await readerWith(t, NEWEST_NODE);
    if (reader) await assertPulls(reader, PERMITTED, warnings);
  });

  test("with the credential file that it allows, and not without", async (t) => {
    const reader = await readerWith(t, NEWEST_NODE);
    if (!reader) return;
    const app = "registry.corp.example:5000/team/app:1.4";
    const line = PERMITTED.replace("alpine:3.22 alpine.tar", `${app} app.tar --cacert corp-ca.pem`);
    assert.ok(line.includes(app));
    const auth = Buffer.from(`ci:${SECRETS.password}`).toString("base64");
    const file = join(reader.env.HOME ?? "", ".docker/config.json");
    mkdirSync(dirname(file));
    writeFileSync(file, JSON.stringify({ auths: { "registry.corp.example:5000": { auth } } }));
    const allowed = await reader.run(line);
    assert.equal(allowed.exitCode, 0, allowed.stderr);
    const { digest } = IMAGES["registry.corp.example"]["team/app:1.4"];
    assert.equal(String(allowed.stdout), `${app}@${digest}\n`);
    const denied = await reader.run(line.replace(/--allow-fs-read="\$HOME\S+/, ""));
    assert.equal(denied.exitCode, 1);
    assert.match(denied.stderr, /401.*\n.*no credentials were found/);
  });

  test("nothing outside the working directory is written", async (t) => {
    const reader = await readerWith(t, NEWEST_NODE);
    if (!reader) return;
    const { exitCode, stderr } = await reader.run(
      PERMITTED.replace(" alpine.tar", " ../alpine.tar"),
    );
    assert.equal(exitCode, 1);
    assert.match(stderr, /^imgpull: cannot write \.\.\/alpine\.tar: /m);
    assert.equal(existsSync(join(reader.folder, "../alpine.tar")), false);
  });

  test("without the network nothing is asked", async (t) => {
    const reader = await readerWith(t, NEWEST_NODE);
    if (!reader) return;
    const { exitCode, stderr } = await reader.run(
      `${PERMITTED.replace("--allow-net", "").trimEnd()} --retries 0`,
    );
    assert.equal(exitCode, 1);
    assert.match(stderr, /--allow-net/);
    assert.equal(reader.registries["docker.io"].requests.length, 0);
  });
});

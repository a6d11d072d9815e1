// The command line: every option, the examples of the user's description typed as written, and what
// bad input gets.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { internals } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import {
  COMMAND,
  type CommandOptions,
  runCommand,
  SECRETS,
  secretForms,
  startCommand,
  type TestScope,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import {
  MEDIA,
  makeImage,
  makeIndex,
  makeManifest,
  makeMultiPlatform,
  readTar,
  type TestContent,
} from "./support/image.ts";
import { type MainOptions, runMain } from "./support/main.ts";
import { startProxy } from "./support/proxy.ts";
import { type Registry, type RegistryOptions, startRegistry } from "./support/registry.ts";

const { architecture } = internals.wantedPlatform({});
const image = makeImage({ seed: "cli", platform: "linux/amd64" });
const AMD64 = ["--scheme", "http", "--platform", "linux/amd64", "--retries", "0"];

async function serve(
  t: TestScope,
  content: TestContent = image,
  options: RegistryOptions = {},
): Promise<Registry> {
  const registry = await startRegistry(options, t);
  registry.add(content, "team/app", "1.0");
  return registry;
}

function namesIn(file: string): string[] {
  const tar = readFileSync(file);
  const entry = readTar(tar).find(({ name }) => name === "index.json");
  const { manifests } = JSON.parse(
    String(tar.subarray(entry?.offset, (entry?.offset ?? 0) + (entry?.size ?? 0))),
  );
  return manifests.map(
    (each: { annotations: Record<string, string> }) => each.annotations["io.containerd.image.name"],
  );
}

// ====== Forms ======

async function parsed(args: string[]): Promise<string> {
  const { exitCode, stdout, stderr } = await runMain(["--parsed", ...args]);
  assert.deepEqual([exitCode, stderr], [0, ""], args.join(" "));
  return String(stdout);
}

const VALUED: [long: string, short: string | undefined, value: string, beside?: string[]][] = [
  ["os", "o", "windows"],
  ["arch", "a", "arm64"],
  ["variant", undefined, "v7"],
  ["platform", undefined, "linux/arm/v7"],
  ["ns", "n", "quay.io"],
  ["user", "u", "me", ["--password", "x"]],
  ["password", "p", "x=y", ["--user", "me"]],
  ["token", "t", "abc=="],
  ["scheme", "s", "http"],
  ["cert", "c", "cert.pem", ["--key", "key.pem"]],
  ["key", "k", "key.pem", ["--cert", "cert.pem"]],
  ["cacert", "x", "ca.pem"],
  ["ca", undefined, "ca.pem"],
  ["manifest", "m", "list"],
  ["from", undefined, "list.txt"],
  ["reuse", undefined, "old.tar"],
  ["since", undefined, "base.tar"],
  ["name", undefined, "alpine:3"],
  ["concurrency", "j", "4"],
  ["retries", undefined, "0"],
  ["timeout", undefined, "1.5"],
];

test("every option in every form: --foo bar, --foo=bar, -f bar, -fbar, -f=bar", async () => {
  const without = await parsed(["alpine", "a.tar"]);
  for (const [long, short, value, beside = []] of VALUED) {
    const rest = [...beside, "alpine", "a.tar"];
    const expected = await parsed([`--${long}`, value, ...rest]);
    assert.notEqual(expected, without, long);
    const shorts = short
      ? [[`-${short}`, value], [`-${short}${value}`], [`-${short}=${value}`]]
      : [];
    for (const form of [[`--${long}=${value}`], ...shorts]) {
      assert.equal(await parsed([...form, ...rest]), expected, form.join(" "));
    }
  }
  assert.equal(
    await parsed(["--ca", "a.pem", "alpine"]),
    await parsed(["--cacert", "a.pem", "alpine"]),
  );
  for (const [long, short] of [
    ["insecure", "i"],
    ["quiet", "q"],
  ] as const) {
    const expected = await parsed([`--${long}`, "alpine"]);
    assert.notEqual(expected, await parsed(["alpine"]), long);
    assert.equal(await parsed([`-${short}`, "alpine"]), expected);
  }
});

test("options stand anywhere among the positionals; -- ends them; --reuse is repeated", async () => {
  const expected = await parsed(["-o", "linux", "-q", "alpine", "busybox", "a.tar"]);
  for (const args of [
    "alpine -o linux busybox -q a.tar",
    "alpine busybox a.tar -q -o=linux",
    "-q alpine busybox -olinux -- a.tar",
    "-o linux -q -- alpine busybox a.tar",
  ]) {
    assert.equal(await parsed(args.split(" ")), expected, args);
  }
  const { stdout } = await runMain(["--parsed", "--", "alpine", "--os"]);
  assert.match(String(stdout), /"--os"/);
  const reused = JSON.parse(await parsed(["--reuse", "a.tar", "alpine", "--reuse=b.tar"]));
  assert.deepEqual(reused.reuse, ["a.tar", "b.tar"]);
  assert.doesNotMatch(await parsed(["alpine", "-"]), /error/);
});

test("names that JavaScript's objects have by themselves are names like others", async () => {
  const pairs = ["--mirror", "constructor=a.corp", "--mirror", "toString=b.corp"];
  const renames = ["--rename", "constructor=x", "--rename", "__proto__=y"];
  const { mirrors, renames: renamed } = JSON.parse(await parsed(["alpine", ...pairs, ...renames]));
  assert.deepEqual(Object.entries(mirrors), [
    ["constructor", ["a.corp"]],
    ["toString", ["b.corp"]],
  ]);
  assert.deepEqual(Object.entries(renamed), [
    ["constructor", "x"],
    ["__proto__", "y"],
  ]);
  for (const name of ["--constructor", "--__proto__", "--toString"]) {
    const { exitCode, stderr } = await runMain([name, "alpine"]);
    assert.deepEqual(
      [exitCode, /^imgpull: unknown option \S+( \(|:)/.test(stderr)],
      [2, true],
      stderr,
    );
  }
});

test("--parsed is JSON, shows no secret, and does nothing", async (t) => {
  const registry = await serve(t);
  const secrets = [
    ["--user", USER, "--password", SECRETS.password],
    ["--token", SECRETS.outsideToken],
    ["-u", USER, `-p=${SECRETS.password}`],
    [`-t${SECRETS.outsideToken}`],
  ];
  for (const words of secrets) {
    const text = await parsed([
      `${registry.host}/team/app:1.0`,
      "no/such/folder/a.tar",
      "-s",
      "http",
      ...words,
    ]);
    assert.match(JSON.stringify(JSON.parse(text)), /"\*\*\*"/);
    for (const form of secretForms()) assert.ok(!text.includes(form), "a secret is shown");
  }
  assert.equal(registry.connections(), 0);
});

// ====== Usage ======

const UNKNOWN_DIGEST = `sha256:${"0".repeat(64)}`;
const MISUSED: [args: string, says: RegExp, options?: MainOptions][] = [
  ["", /IMAGE/],
  ["--insecur alpine", /--insecur.*--insecure/],
  ["--manifst list alpine", /--manifst.*--manifest/],
  ["--plattform=linux/arm alpine", /--plattform.*--platform/],
  ["--conc 3 alpine", /--conc.*--concurrency/],
  ["--frobnicate alpine", /--frobnicate/],
  ["-z alpine", /-z/],
  ["-o linux alpine --os linux", /--os.*twice/],
  ["-q alpine -q", /--quiet.*twice/],
  ["--ca a.pem --cacert b.pem alpine", /--cacert.*twice/],
  ["--platform linux/amd64 --os linux alpine", /--platform.*--os/],
  ["--platform linux/amd64 -a arm alpine", /--platform.*--arch/],
  ["--platform all --variant v7 alpine", /--platform.*--variant/],
  ["-c cert.pem alpine", /--cert.*--key/],
  ["-k key.pem alpine", /--cert.*--key/],
  ["--password-stdin -u me --from - a.tar", /stdin.*twice/],
  ["alpine --os", /--os.*value/],
  ["alpine -o", /-o.*value/],
  ["alpine --os= a.tar", /--os.*value/],
  ["alpine --os --arch amd64", /--os.*value/],
  ["alpine --insecure=maybe a.tar", /--insecure.*value/],
  ["alpine -s ftp", /--scheme.*https.*ftp/],
  ["alpine -m both", /--manifest.*list.*both/],
  ["alpine -j 0", /--concurrency.*0/],
  ["alpine -j many", /--concurrency.*many/],
  ["alpine -j 1.5", /--concurrency.*1\.5/],
  ["alpine --retries=-1", /--retries.*-1/],
  ["alpine --retries 1e1", /--retries.*1e1/],
  ["alpine --timeout soon", /--timeout.*soon/],
  ["alpine --timeout 0", /--timeout.*0/],
  ["alpine --platform linux", /--platform.*linux/],
  ["alpine --platform linux/", /--platform/],
  ["alpine --platform linux/arm/v7/x", /--platform/],
  ["alpine --ns https://quay.io", /ns|host/],
  ["alpine -u me -p x -t y", /--token.*--user/],
  ["alpine -p x", /--password/],
  ["alpine -u me -p x --password-stdin", /--password-stdin/],
  ["alpine --name Bad:Name a.tar", /Bad:Name/],
  ["alpine busybox --name app:1 a.tar", /--name.*one/],
  ["--from list.txt", /DEST/],
  ["Alpine", /Alpine.*lower case/],
  ["alpine:", /alpine:.*tag/],
  ["alpine@sha256:../../x a.tar", /digest/],
  ["alpine:3 busybox:1", /busybox:1.*\.\/busybox:1/],
  [`alpine:3 busybox@${UNKNOWN_DIGEST}`, /busybox@sha256/],
  ["-u me -p x alpine quay.io/app a.tar", /--user.*docker\.io.*quay\.io/],
  ["-t x quay.io/app ghcr.io/org/app a.tar", /--token/],
  ["-n docker.io localhost:1/app localhost:2/app a.tar", /--ns/],
  ["-c c.pem -k k.pem localhost:1/app localhost:2/app a.tar", /--cert/],
  ["-u me --password-stdin --from - a.tar", /stdin/],
  ["--from - a.tar", /bücher/, { stdin: "alpine\nbücher\n" }],
  ["--from - a.tar", /--from -: there is no image in it/, { stdin: "# none\n\n" }],
  ["--from - a.tar", /--from -: there is no image in it/, { stdin: "" }],
  ["alpine: a.tar", /the tag behind the : is empty/],
  ["--from - a.tar", /"alpine 3": it has a space/, { stdin: "alpine 3\n" }],
  ["alpine -u me a.tar", /--user needs --password or --password-stdin/],
  ["alpine --password-stdin a.tar", /--password-stdin needs --user/],
  [
    "alpine -u me --password-stdin a.tar",
    /--password-stdin: there is no password on stdin/,
    { stdin: "" },
  ],
  ["alpine -u me --password-stdin a.tar", /no password on stdin/, { stdin: "\n" }],
  // A tar where an IMAGE is wanted.
  ["a.tar", /IMAGE is missing: a\.tar is a DEST; --list-tar a\.tar says what it holds/],
  ["a.tar -m list", /IMAGE is missing: a\.tar/],
  ["alpine a.tar b.tar", /a\.tar is no IMAGE: DEST is the last word/],
  // Words of other programs.
  ["alpine -o x.tar", /-o is --os, and x\.tar is no operating system: DEST is the last word/],
  ["alpine -o=./x", /-o is --os.*DEST is the last word/],
  ["alpine --os C:\\x.tar", /--os.*DEST is the last word/],
  ["alpine --output x.tar", /--output: DEST is the last word: imgpull IMAGE DEST/],
  ["alpine --output=x.tar", /--output: DEST is the last word/],
  ["alpine --http a.tar", /--http: say --scheme http/],
  ["alpine --plain-http a.tar", /--plain-http: say --scheme http/],
  ["alpine --all-platforms a.tar", /--platform all/],
  ["alpine --authfile auth.json a.tar", /REGISTRY_AUTH_FILE=FILE/],
  ["pull alpine", /no "pull" in front: imgpull IMAGE DEST/],
  ["pull alpine a.tar -q", /no "pull" in front/],
  ["pull", /no "pull" in front/],
  // A DEST that was forgotten.
  ["alpine:3 quay.io/org/app:1", /DEST is missing: "quay\.io\/org\/app:1" reads as an IMAGE/],
  ["alpine:3 quay.io/org/app", /DEST is missing: "quay\.io\/org\/app" reads/],
  ["alpine:3 localhost:5000/app", /DEST is missing: "localhost:5000\/app" reads/],
  ["alpine:3 org/app:2", /DEST is missing: "org\/app:2" reads/],
  [`alpine:3 org/app@${UNKNOWN_DIGEST}`, /DEST is missing/],
  // What does not go with what is asked for.
  ["--verify a.tar --platform linux/amd64", /--platform does not go with --verify/],
  ["--verify a.tar --scheme http", /--scheme does not go with --verify/],
  ["--verify a.tar --reuse b.tar", /--reuse does not go with --verify/],
  ["--verify a.tar --list-tar b.tar", /--list-tar does not go with --verify/],
  ["--verify a.tar -m list", /--manifest does not go with --verify/],
  ["--verify a.tar b.tar", /--verify takes one tar/],
  ["--list-tar a.tar --insecure", /--insecure does not go with --list-tar/],
  ["--list-tar a.tar --password-stdin", /--password-stdin does not go with --list-tar/],
  ["--list-tar a.tar --dry-run", /--dry-run does not go with --list-tar/],
  ["alpine -m list --name x", /--name does not go with --manifest/],
  ["alpine -m image --from list.txt", /--from does not go with --manifest/],
  ["alpine -m image --platform all", /--platform names several/],
  [`alpine --name x:1@${UNKNOWN_DIGEST} a.tar`, /--name is NAME or NAME:TAG/],
  ["alpine -m image --referrers", /--referrers does not go with --manifest/],
];

test("misuse: one line on stderr that names it, exit code 2", async () => {
  for (const [args, says, options] of MISUSED) {
    const words = args === "" ? [] : args.split(" ");
    const { exitCode, stdout, stderr } = await runMain(words, options);
    assert.deepEqual([exitCode, String(stdout)], [2, ""], `${args}: ${stderr}`);
    assert.match(stderr, says, args);
    assert.match(stderr, /^[^\n]+\n$/, args);
  }
});

test("a DEST that could be an IMAGE but says that it is a file is one", async (t) => {
  const registry = await serve(t);
  const cwd = temporaryFolder(t);
  mkdirSync(join(cwd, "out"));
  mkdirSync(join(cwd, "quay.io"));
  const files = ["./busybox:1", "out/busybox:1", "quay.io/app:1", "busybox:1.tar", "busybox"];
  for (const dest of files) {
    const { exitCode, stderr } = await runCommand(
      [`${registry.host}/team/app:1.0`, dest, ...AMD64],
      { cwd },
    );
    assert.equal(exitCode, 0, stderr);
    assert.equal(namesIn(join(cwd, dest)).length, 1);
  }
});

test("--version and --help", async () => {
  for (const word of ["-v", "--version"]) {
    const { exitCode, stdout, stderr } = await runMain([word]);
    assert.deepEqual([exitCode, stderr], [0, ""]);
    const [first] = String(stdout).split("\n");
    assert.match(
      first ?? "",
      /^imgpull version: \d+\.\d+\.\d+ build date: \d{4}-\d\d-\d\dT[\d:.]+Z$/,
    );
  }
  assert.equal(
    String((await runMain(["version"])).stdout),
    String((await runMain(["--version"])).stdout),
  );
  const { exitCode, stdout } = await runMain(["--help"]);
  for (const words of [["help"], ["help", "pull"]])
    assert.equal(String((await runMain(words)).stdout), String(stdout));
  const help = String(stdout);
  assert.equal(exitCode, 0);
  assert.equal(String((await runMain(["-h", "--version"])).stdout), help);
  for (const [long, short] of VALUED) {
    assert.match(help, new RegExp(`--${long}\\b`));
    if (short) assert.match(help, new RegExp(`-${short}, --${long}\\b`));
  }
  const switches = ["password-stdin", "insecure", "parsed", "quiet", "version", "help"];
  for (const name of switches) assert.match(help, new RegExp(`--${name}\\b`));
  const lines = help.trimEnd().split("\n");
  assert.ok(lines.length <= 40, `${lines.length} lines`);
  for (const line of lines) assert.ok([...line].length <= 80, line);
});

// ====== Streams ======

test("DEST: a file, its default name, stdout, a directory, a path that ends in a slash", async (t) => {
  const registry = await serve(t);
  const reference = `${registry.host}/team/app:1.0`;
  const cwd = temporaryFolder(t);
  mkdirSync(join(cwd, "there"));
  const pinned = `${reference}@${image.digest}\n`;
  const run = async (...dest: string[]) => {
    const { exitCode, stdout, stderr } = await runCommand([reference, ...dest, ...AMD64, "-q"], {
      cwd,
    });
    assert.deepEqual([exitCode, stderr], [0, ""]);
    return stdout;
  };
  assert.equal(String(await run("a.tar")), pinned);
  assert.equal(String(await run()), pinned);
  assert.ok(readFileSync(join(cwd, "app-1.0.tar")).equals(readFileSync(join(cwd, "a.tar"))));
  assert.ok((await run("-")).equals(readFileSync(join(cwd, "a.tar"))));
  for (const folder of ["there", "made/"]) {
    assert.equal(String(await run(folder)), pinned);
    const read = (name: string) => JSON.parse(readFileSync(join(cwd, folder, name), "utf8"));
    assert.deepEqual(read("oci-layout"), { imageLayoutVersion: "1.0.0" });
    const [entry] = read("index.json").manifests;
    assert.equal(entry.digest, image.digest);
    for (const [digest, bytes] of image.blobs) {
      assert.ok(readFileSync(join(cwd, folder, "blobs", digest.replace(":", "/"))).equals(bytes));
    }
  }
  assert.deepEqual(readdirSync(cwd).sort(), ["a.tar", "app-1.0.tar", "made", "there"]);
});

test("what is printed pins what was pulled: the same bytes from it, as words or as a file", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const registry = await serve(t, index);
  registry.add(image, "team/app", "2.0");
  const folder = temporaryFolder(t);
  const pull = async (dest: string, words: string[], options: MainOptions = {}) => {
    const { exitCode, stdout, stderr } = await runMain(
      [...words, join(folder, dest), ...AMD64],
      options,
    );
    assert.equal(exitCode, 0, stderr);
    return { lock: String(stdout), tar: readFileSync(join(folder, dest)) };
  };
  const { lock, tar } = await pull("a.tar", [
    `${registry.host}/team/app:1.0`,
    `${registry.host}/team/app:2.0`,
  ]);
  assert.equal(
    lock,
    `${registry.host}/team/app:1.0@${index.children[0]?.digest}\n` +
      `${registry.host}/team/app:2.0@${image.digest}\n`,
  );
  registry.remove("team/app", "1.0");
  const words = await pull("b.tar", lock.trimEnd().split("\n"));
  assert.ok(words.tar.equals(tar));
  assert.equal(words.lock, lock);
  writeFileSync(
    join(folder, "images.lock"),
    `# base\n\n${lock.replace("\n", "  # the first\r\n")}`,
  );
  assert.ok((await pull("c.tar", ["--from", join(folder, "images.lock")])).tar.equals(tar));
  assert.ok((await pull("d.tar", ["--from", "-"], { stdin: lock })).tar.equals(tar));
});

test("--manifest prints the exact bytes, the digest on stderr, and ignores a DEST", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const registry = await serve(t, index);
  const dest = join(temporaryFolder(t), "a.tar");
  const words = [`${registry.host}/team/app:1.0`, dest, "-s", "http", "-o", "linux", "-a", "arm64"];
  const [, child] = index.children;
  const cases: [string, TestContent | undefined][] = [
    ["list", index],
    ["image", child],
  ];
  for (const [type, content] of cases) {
    const { exitCode, stdout, stderr } = await runMain([...words, "--manifest", type]);
    assert.equal(exitCode, 0, stderr);
    assert.ok(content?.bytes.equals(stdout), type);
    assert.equal(stderr, `${content?.digest}\n`);
  }
  const onTerminal = await runMain([...words, "-m", "image"], { terminalColumns: 80 });
  const indented = JSON.stringify(JSON.parse(String(child?.bytes)), null, 2);
  assert.equal(String(onTerminal.stdout), `${indented}\n`);
  assert.equal(registry.blobRequests().length, 0);
  assert.deepEqual(readdirSync(join(dest, "..")), []);

  registry.add(image, "team/app", "single");
  const none = await runMain([`${registry.host}/team/app:single`, "-s", "http", "-m", "list"]);
  assert.deepEqual([none.exitCode, String(none.stdout)], [1, ""]);
  assert.match(none.stderr, /list/);
  assert.match(none.stderr, /^([^\n]+\n){1,2}$/);
});

test("credentials: --user with --password or --password-stdin, --token without a handshake", async (t) => {
  const registry = await serve(t, image, {
    auth: { mode: "basic", outsideToken: SECRETS.outsideToken },
  });
  const cases: [string[], MainOptions, string, number][] = [
    [["-u", USER, "-p", SECRETS.password], {}, `${USER}:${SECRETS.password}`, 401],
    [
      ["-u", USER, "--password-stdin"],
      { stdin: `${SECRETS.password}\n` },
      `${USER}:${SECRETS.password}`,
      401,
    ],
    [["-t", SECRETS.outsideToken], {}, String(Buffer.from(SECRETS.outsideToken, "base64")), 200],
  ];
  for (const [words, options, secret, firstStatus] of cases) {
    registry.forget();
    const all = [
      `${registry.host}/team/app:1.0`,
      join(temporaryFolder(t), "a.tar"),
      ...AMD64,
      ...words,
    ];
    const { exitCode, stdout, stderr } = await runMain(all, options);
    assert.equal(exitCode, 0, stderr);
    assert.equal(registry.requests[0]?.status, firstStatus);
    const sent = registry.requests.at(-1)?.headers.authorization ?? "";
    assert.equal(sent, `Basic ${Buffer.from(secret).toString("base64")}`);
    for (const form of secretForms()) assert.ok(!`${stdout}${stderr}`.includes(form));
  }
});

test("SIGINT ends with 130 and SIGTERM with 143; DEST stays as it was", async (t) => {
  for (const [name, exitCode] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const) {
    const registry = await serve(t);
    const rule = registry.on({ kind: "layer" }, { stallAfter: 100 });
    const cwd = temporaryFolder(t);
    writeFileSync(join(cwd, "a.tar"), "as it was");
    const { child, result } = startCommand([`${registry.host}/team/app:1.0`, "a.tar", ...AMD64], {
      cwd,
    });
    await rule.reached;
    child.kill(name);
    const ended = await result;
    assert.deepEqual([ended.exitCode, ended.signal], [exitCode, null], ended.stderr);
    assert.doesNotMatch(ended.stderr, /^\s+at /m);
    assert.equal(readFileSync(join(cwd, "a.tar"), "utf8"), "as it was");
  }
});

test("SIGINT ends a command that waits for its stdin", async (t) => {
  const registry = await serve(t);
  for (const words of [
    ["--from", "-", "a.tar"],
    [`${registry.host}/team/app:1.0`, "a.tar", "-u", "me", "--password-stdin"],
  ]) {
    const cwd = temporaryFolder(t);
    const { child, result } = startCommand([...words, ...AMD64], { cwd, stdin: "open" });
    setTimeout(() => child.kill("SIGINT"), 1500); // by then it waits; if not, it ends all the same
    const { exitCode, signal } = await result;
    assert.ok(exitCode === 130 || signal === "SIGINT", `${exitCode} ${signal}`);
  }
});

test("a pipe that nobody reads is told of, and then read all the same", async (t) => {
  const registry = await serve(t);
  const cwd = temporaryFolder(t);
  const made = spawnSync("mkfifo", [join(cwd, "pipe")]);
  if (made.status !== 0) return t.skip("mkfifo is not here");

  let reading: Promise<Buffer> | undefined;
  const onStderr = (text: string) => {
    if (text.includes("pipe: waiting for somebody")) reading ??= readFile(join(cwd, "pipe"));
  };
  const words = [`${registry.host}/team/app:1.0`, "pipe", ...AMD64];
  const { exitCode, stderr } = await runCommand(words, { cwd, onStderr, guardMs: 20_000 });
  assert.equal(exitCode, 0, stderr);
  assert.ok(reading, "it was told");
  assert.ok(readTar(await reading).length > 0);
});

test("a password that is typed is asked for, and not shown", {
  skip: spawnSync("script", ["--version"]).status !== 0 && "script is not here",
}, async (t) => {
  const registry = await serve(t, image, { auth: "basic" });
  const given = [`${registry.host}/team/app:1.0`, "a.tar", "-u", USER, "--password-stdin"];
  const line = [...COMMAND, ...given, ...AMD64].join(" ");
  const { child, result } = startCommand(["--quiet", "--return", "--command", line, "/dev/null"], {
    command: ["script"],
    cwd: temporaryFolder(t),
    stdin: "open",
  });
  let shown = "";
  child.stdout?.on("data", (chunk: Buffer) => {
    const isAsked = !shown.includes("Password: ");
    shown += chunk;
    if (isAsked && shown.includes("Password: ")) child.stdin?.write(`${SECRETS.password}\r`);
  });
  const { exitCode } = await result;
  child.stdin?.end();
  assert.equal(exitCode, 0, shown);
  assert.match(shown, /app:1\.0@sha256:/);
  for (const form of secretForms()) assert.ok(!shown.includes(form));
});

// ====== The examples of the description ======

interface Example {
  line: string;
  at: "hub" | "login" | "basic" | "mtls" | "private" | "plain" | "mirror" | "nowhere";
  /** The tar that it leaves; or what it prints. */
  leaves?: string;
  prints?: RegExp;
  name?: string;
}

const LATEST = "hello-world-latest.tar";
const HELLO = `docker.io/hello-world:latest ${LATEST}`;
const DEFAULT: Omit<Example, "line"> = { at: "hub", leaves: LATEST };
const EXAMPLES: Example[] = [
  {
    line: "bin/imgpull --version",
    at: "nowhere",
    prints: /^imgpull version: \S+ build date: \S+Z\n/,
  },
  { line: "bin/imgpull --help", at: "nowhere", prints: /--platform/ },
  { line: `bin/imgpull ${HELLO}`, ...DEFAULT },
  { line: `bin/imgpull ${HELLO} --os linux --arch amd64`, ...DEFAULT },
  {
    line: "bin/imgpull docker.io/hello-world:latest ./hello-world.tar -o linux -a amd64",
    at: "hub",
    leaves: "hello-world.tar",
  },
  {
    line: "bin/imgpull localhost:8080/curl/curl:8.10.1 quay.io-curl-8.1.0.1.tar --ns quay.io",
    at: "mirror",
    leaves: "quay.io-curl-8.1.0.1.tar",
    name: "quay.io/curl/curl:8.10.1",
  },
  { line: `bin/imgpull ${HELLO}\\\n --user jqpubli --password mypass`, ...DEFAULT, at: "login" },
  {
    line: `bin/imgpull my.inhouse.http.registry/hello-world:latest ${LATEST}\\\n --scheme http`,
    at: "plain",
    leaves: LATEST,
    name: "my.inhouse.http.registry/hello-world:latest",
  },
  {
    line:
      `bin/imgpull my.mtls.registry/hello-world:latest ${LATEST}\\\n` +
      " --cert /path/to/cert.pem --key /path/to/key.pem",
    at: "mtls",
    leaves: LATEST,
    name: "my.mtls.registry/hello-world:latest",
  },
  {
    line: `bin/imgpull my.private.registry/hello-world:latest ${LATEST}\\\n --ca /path/to/ca.pem`,
    at: "private",
    leaves: LATEST,
    name: "my.private.registry/hello-world:latest",
  },
  {
    line: `bin/imgpull my.private.registry/hello-world:latest ${LATEST} --insecure`,
    at: "private",
    leaves: LATEST,
    name: "my.private.registry/hello-world:latest",
  },
  {
    line: "bin/imgpull docker.io/hello-world:latest --manifest list",
    at: "hub",
    prints: /^\{.*"manifests"/s,
  },
  {
    line: "bin/imgpull docker.io/hello-world:latest --manifest image",
    at: "hub",
    prints: /^\{.*"layers"/s,
  },
  {
    line: `bin/imgpull my.inhouse.http.registry/hello-world:latest ${LATEST} --cacert /path/to/ca.pem --parsed`,
    at: "nowhere",
    prints: /^\{.*my\.inhouse\.http\.registry\/hello-world:latest.*ca\.pem/s,
  },
  {
    line: "bin/imgpull docker.io/hello-world:latest --cert ~/mycert.pem --key ~/mykey.pem",
    ...DEFAULT,
    at: "mtls",
  },
  {
    line: "bin/imgpull docker.io/hello-world:latest --cacert ~/myca.pem",
    ...DEFAULT,
    at: "private",
  },
  { line: "bin/imgpull docker.io/hello-world:latest --insecure", ...DEFAULT, at: "private" },
  {
    line: "bin/imgpull docker.io/hello-world:latest --user foobar --password frobozz",
    ...DEFAULT,
    at: "basic",
  },
  {
    line: "bin/imgpull localhost:8080/hello-world:latest --scheme http",
    at: "plain",
    leaves: LATEST,
    name: "localhost:8080/hello-world:latest",
  },
  {
    line: "bin/imgpull localhost:8080/hello-world:latest --ns docker.io",
    at: "mirror",
    leaves: LATEST,
  },
];

test("the examples of the description, typed as written into a shell", async (t) => {
  const system = makeAuthority("the system's CA");
  const own = makeAuthority("my CA");
  const names = {
    dns: ["localhost", "registry-1.docker.io", "my.mtls.registry", "my.private.registry"],
  };
  const client = own.issueClient({ commonName: "me" });
  const tls = system.issueServer(names);
  const folder = temporaryFolder(t);
  for (const [name, pem] of Object.entries({ cert: client.cert, key: client.key, ca: own.cert })) {
    writeFileSync(join(folder, `${name}.pem`), pem);
    writeFileSync(join(folder, `my${name}.pem`), pem);
  }
  writeFileSync(join(folder, "system.pem"), system.cert);
  const login = { user: "jqpubli", password: "mypass", anonymous: "refused" } as const;
  const registries: Record<string, Registry> = {
    hub: await startRegistry({ tls, auth: "bearer" }, t),
    login: await startRegistry({ tls, auth: { mode: "bearer", ...login } }, t),
    basic: await startRegistry(
      { tls, auth: { mode: "basic", user: "foobar", password: "frobozz" } },
      t,
    ),
    mtls: await startRegistry({ tls: { ...tls, clientCa: own.cert } }, t),
    private: await startRegistry({ tls: own.issueServer(names) }, t),
    plain: await startRegistry({}, t),
    mirror: await startRegistry({ tls }, t),
    nowhere: await startRegistry({}, t),
  };
  const platforms = [...new Set(["linux/arm64", "linux/amd64", `linux/${architecture}`])];
  const hello = makeMultiPlatform(platforms, { seed: "hello-world", layers: [4096] });
  for (const registry of Object.values(registries)) {
    for (const repository of ["hello-world", "library/hello-world"])
      registry.add(hello, repository, "latest");
    registry.add(hello, "curl/curl", "8.10.1");
  }

  for (const {
    line,
    at,
    leaves,
    prints,
    name = "docker.io/library/hello-world:latest",
  } of EXAMPLES) {
    const registry = registries[at] as Registry;
    const port = registry.host.split(":")[1] ?? "";
    registry.forget();
    const hosts = Object.fromEntries(
      [
        "registry-1.docker.io",
        "my.mtls.registry",
        "my.private.registry",
        "my.inhouse.http.registry",
      ].map((host) => [host, registry.host]),
    );
    const proxy = await startProxy(t, { hosts });
    const cwd = temporaryFolder(t);
    mkdirSync(join(cwd, "bin"));
    symlinkSync(COMMAND.at(-1) ?? "", join(cwd, "bin/imgpull"));
    const typed = line.replaceAll(":8080", `:${port}`).replaceAll("/path/to/", `${folder}/`);
    const proxies = { HTTPS_PROXY: proxy.url, HTTP_PROXY: proxy.url };
    const env = { HOME: folder, SSL_CERT_FILE: join(folder, "system.pem"), ...proxies };
    const { exitCode, stdout, stderr } = await runCommand([], {
      command: ["sh", "-c", typed],
      cwd,
      env,
    });
    assert.equal(exitCode, 0, `${line}\n${stderr}`);
    assert.deepEqual(
      readdirSync(cwd).sort(),
      leaves === undefined ? ["bin"] : ["bin", leaves].sort(),
      line,
    );
    if (prints) assert.match(String(stdout), prints, line);
    if (leaves !== undefined)
      assert.deepEqual(namesIn(join(cwd, leaves)), [name.replace(":8080", `:${port}`)], line);
    assert.equal(registry.requests.length > 0, at !== "nowhere", line);
    const isMirror = at === "mirror";
    const namespaces = new Set(registry.requests.map(({ query }) => query.get("ns")));
    if (isMirror) assert.deepEqual([...namespaces], [name.split("/")[0]], line);
    if (at === "mtls")
      assert.ok(
        registry.requests.every(({ clientCertificate }) => clientCertificate === "me"),
        line,
      );
  }
});

// ====== Bad input ======

const authority = makeAuthority();
const wrongPassword = "s3cr3t-but-wrong-Yt61";

interface BadInput {
  content?: TestContent;
  options?: RegistryOptions;
  prepare?: (registry: Registry) => void;
  /** In place of `HOST/team/app:1.0 app.tar` and AMD64. */
  words?: (host: string) => string[];
  command?: (words: string[]) => CommandOptions;
  exitCode?: number;
  says: RegExp;
  /** At most so many lines on stderr, default 2. */
  lines?: number;
  /** A partial file may stay, if stderr names it. */
  keeps?: true;
  /** Blobs may be asked for. */
  fetches?: true;
}

/**
 * As a resolver answers for a name that does not exist; the one of the machine may not be reachable
 * at all.
 */
const NO_SUCH_HOST = `require("node:dns").lookup = (hostname, options, done) => {
  const error = new Error("getaddrinfo ENOTFOUND " + hostname);
  process.nextTick(done ?? options, Object.assign(error, { code: "ENOTFOUND", syscall: "getaddrinfo", hostname }));
};`;

/** Answers what it cannot read with 400, as servers do; the test registry hangs up. */
const plainServer = createServer();
before(async () => await once(plainServer.listen(0, "127.0.0.1"), "listening"));
after(() => plainServer.close());

const inShell =
  (script: string) =>
  (words: string[]): CommandOptions => ({ command: ["sh", "-c", script, ...COMMAND, ...words] });
const html = {
  body: "<!doctype html><title>Welcome</title>",
  headers: { "content-type": "text/html" },
};
const petabyte = makeImage({
  editManifest: (manifest) => ({
    ...manifest,
    layers: manifest.layers.map((layer) => ({ ...layer, size: 2 ** 50 })),
  }),
});
const withLayer = (fields: object) =>
  makeImage({
    editManifest: (manifest) => ({ ...manifest, layers: [{ ...manifest.layers[0], ...fields }] }),
  });
const itself = makeIndex([{ content: makeIndex([image]), platform: null }]);
const inner = makeIndex([makeIndex([makeIndex([makeIndex([makeIndex([image])])])])]);
const large = makeImage({ layers: [60_000] });

const BAD_INPUTS: Record<string, BadInput> = {
  "no such host": {
    words: () => ["registry.invalid/team/app:1.0", "app.tar", "--retries", "0"],
    command: () => ({ env: { NODE_OPTIONS: "--require ./no-such-host.cjs" } }),
    says: /registry\.invalid.*no such host/,
  },
  "no such repository": {
    words: (host) => [`${host}/team/none:1.0`, "app.tar", ...AMD64],
    says: /no such repository.*team\/none/,
  },
  "no such tag": {
    words: (host) => [`${host}/team/app:9`, "app.tar", ...AMD64],
    says: /no such tag.*team\/app:9/,
  },
  "no such platform": {
    content: makeMultiPlatform(["linux/amd64", "linux/arm/v7"]),
    words: (host) => [`${host}/team/app:1.0`, "app.tar", "-s", "http", "-a", "riscv64"],
    says: /riscv64.*\n?.*linux\/amd64, linux\/arm\/v7/,
  },
  ...Object.fromEntries(
    ["app.tar.gz", "app.TGZ", "sub/app.tar.zst", "app.tzst", "app.tar.xz", "app.tar.bz2"].map(
      (dest): [string, BadInput] => [
        `DEST ${dest}`,
        {
          words: (host) => [`${host}/team/app:1.0`, dest, ...AMD64],
          exitCode: 2,
          lines: 1,
          says: /DEST is a plain tar, not a \.t/i,
        },
      ],
    ),
  ),
  "bad reference": {
    words: (host) => [`${host}/Team/app:1.0`, "app.tar"],
    exitCode: 2,
    lines: 1,
    says: /lower case/,
  },
  "bad digest in the reference": {
    words: (host) => [`${host}/team/app@sha256:../../x`, "app.tar"],
    exitCode: 2,
    lines: 1,
    says: /digest/,
  },
  "DEST's folder is missing": {
    words: (host) => [`${host}/team/app:1.0`, "no/such/app.tar", ...AMD64],
    says: /no\/such/,
  },
  "DEST's folder is a file": {
    words: (host) => [`${host}/team/app:1.0`, "app.tar/app.tar", ...AMD64],
    says: /app\.tar\/app\.tar/,
  },
  "disk too small": { content: petabyte, says: /app\.tar.*(space|free)/ },
  "disk full": {
    content: large,
    command: inShell('ulimit -f 16; exec "$0" "$@"'),
    says: /app\.tar.*file/,
    keeps: true,
    lines: 3,
  },
  "stdout full": {
    words: (host) => [`${host}/team/app:1.0`, "-", ...AMD64],
    command: inShell('exec "$0" "$@" >/dev/full'),
    says: /disk is full/,
    fetches: true,
  },
  "not a registry": {
    prepare: (registry) => registry.on({}, html),
    says: /not a manifest|registry/,
  },
  "not a registry, with 404": {
    prepare: (registry) => registry.on({}, { ...html, status: 404 }),
    says: /html|a registry\?/i,
  },
  "HTTP on an HTTPS port": {
    words: () => [
      `localhost:${(plainServer.address() as AddressInfo).port}/team/app:1.0`,
      "app.tar",
    ],
    says: /plain HTTP.*\n?.*--scheme http/,
  },
  "unknown CA": {
    options: { tls: authority.issueServer() },
    words: (host) => [`${host}/team/app:1.0`, "app.tar", "--retries", "0"],
    says: /--cacert.*--insecure/,
  },
  "wrong password, basic": {
    options: { auth: "basic" },
    says: /401.*\n?.*--user/,
    words: (host) => [`${host}/team/app:1.0`, "app.tar", ...AMD64, "-u", USER, "-p", wrongPassword],
  },
  "wrong password, bearer": {
    options: { auth: "bearer" },
    says: /401.*\n?.*--user/,
    words: (host) => [`${host}/team/app:1.0`, "app.tar", ...AMD64, "-u", USER, "-p", wrongPassword],
  },
  "digest mismatch": {
    content: large,
    prepare: (registry) => registry.on({ kind: "layer" }, { corruptAt: 1000 }),
    says: new RegExp(`${large.layers[0]?.digest}.*digest`),
    fetches: true,
  },
  "manifest of 50 MB": {
    content: makeManifest(MEDIA.ociManifest, Buffer.alloc(50e6, " ")),
    says: /manifest.*(large|more than)/,
  },
  "schema 1": {
    content: makeManifest(MEDIA.dockerSchema1, {
      schemaVersion: 1,
      name: "team/app",
      tag: "1.0",
      fsLayers: [],
    }),
    says: /schema 1/,
  },
  "an index inside an index inside itself": {
    content: itself,
    says: /digest/,
    prepare: (registry) =>
      registry.on(
        { kind: "manifest", tag: itself.index.manifests[0]?.digest ?? "" },
        { body: itself.bytes },
      ),
  },
  "indexes too deep": { content: inner, says: /deep/ },
  "a layer's digest is a path": {
    content: withLayer({ digest: "sha256:../../x" }),
    says: /sha256:\.\.\/\.\.\/x/,
  },
  "an index entry's digest is a path": {
    content: makeIndex([{ content: image, fields: { digest: "sha256:../../x" } }]),
    says: /sha256:\.\.\/\.\.\/x/,
  },
  "a negative size": { content: withLayer({ size: -1 }), says: /size -1/ },
  "a size that is no number": { content: withLayer({ size: "8192" }), says: /size "8192"/ },
};

for (const [name, bad] of Object.entries(BAD_INPUTS)) {
  test(`bad input: ${name}`, async (t) => {
    const registry = await serve(t, bad.content, bad.options);
    bad.prepare?.(registry);
    const cwd = temporaryFolder(t);
    writeFileSync(join(cwd, "app.tar"), "as it was");
    writeFileSync(join(cwd, "no-such-host.cjs"), NO_SUCH_HOST);
    const words = [
      "-q",
      ...(bad.words?.(registry.host) ?? [`${registry.host}/team/app:1.0`, "app.tar", ...AMD64]),
    ];
    const options = bad.command?.(words) ?? {};
    const { exitCode, stdout, stderr } = await runCommand(options.command ? [] : words, {
      ...options,
      cwd,
    });
    assert.equal(exitCode, bad.exitCode ?? 1, stderr);
    assert.match(stderr, bad.says);
    assert.match(stderr, new RegExp(`^([^\\n]+\\n){1,${bad.lines ?? 2}}$`));
    assert.match(stderr, /^imgpull: /);
    assert.doesNotMatch(stderr, /^\s+at .*:\d+/m, "a stack trace");
    assert.ok(!stderr.includes(wrongPassword), "the password");
    assert.equal(String(stdout), "");
    assert.equal(readFileSync(join(cwd, "app.tar"), "utf8"), "as it was");
    const mayStay = bad.keeps && stderr.includes("app.tar.partial") ? /^app\.tar\.partial/ : /^$/;
    const left = readdirSync(cwd).filter((file) => !mayStay.test(file));
    assert.deepEqual(left.sort(), ["app.tar", "no-such-host.cjs"]);
    if (!bad.fetches) assert.equal(registry.seen({ kind: "layer" }).length, 0);
  });
}

test("what a registry says is shown without control characters; signatures and tokens are not shown", async (t) => {
  const registry = await serve(t);
  const message = "no\u001b[2J\u0007 \u009b31m\r\nimgpull: done\u202e";
  const body = JSON.stringify({ errors: [{ code: "DENIED", message }] });
  registry.on({ kind: "manifest", times: 1 }, { status: 403, body });
  const words = [`${registry.host}/team/app:1.0`, join(temporaryFolder(t), "app.tar"), ...AMD64];
  const denied = await runMain(words);
  assert.equal(denied.exitCode, 1);
  assert.match(denied.stderr, /403.*imgpull: done/);
  assert.doesNotMatch(denied.stderr, /[^\P{Cc}\n]|\u202e/u);
  assert.match(denied.stderr, /^([^\n]+\n){1,2}$/);

  registry.on({ kind: "layer" }, { redirect: "storage" });
  registry.on(
    { kind: "storage" },
    { status: 403, body: "<Error><Code>AccessDenied</Code></Error>" },
  );
  const expired = await runMain(words);
  assert.equal(expired.exitCode, 1);
  assert.match(expired.stderr, /403/);
  assert.doesNotMatch(expired.stderr, /X-Amz/);
  for (const form of secretForms()) assert.ok(!expired.stderr.includes(form));
});

test("429 with a long Retry-After ends at once and says when to come back", async (t) => {
  const registry = await serve(t);
  registry.on({ kind: "manifest" }, { status: 429, headers: { "retry-after": "3600" } });
  const words = [`${registry.host}/team/app:1.0`, join(temporaryFolder(t), "a.tar"), "-s", "http"];
  const { exitCode, stderr } = await runMain(words);
  assert.equal(exitCode, 1);
  assert.match(stderr, /429.*\n?.*(3600 s|60 min|1 h|\d\d:\d\d)/);
  assert.equal(registry.requests.length, 1);
});

test("-m list of a single image says what to type", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(IMAGE, "team/app", "1.0");
  const { exitCode, stderr } = await runCommand([reference, "-m", "list", "--scheme", "http"]);
  assert.equal(exitCode, 1);
  assert.equal(
    stderr,
    `imgpull: ${reference} is one image, without a list: ask for --manifest image\n`,
  );
});

test("sentences name what can be done, as it is typed", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(IMAGE, "team/app", "1.0");
  registry.on({ kind: "manifest" }, { stallAfter: 0 });
  const folder = temporaryFolder(t);
  const http = ["--scheme", "http", "--retries", "0", "--timeout", "0.1"];
  const list = join(folder, "list");
  writeFileSync(list, `${reference}\n`);
  for (const [words, says] of [
    [[reference, "a.tar", ...http], /^ {2}--timeout waits longer$/m],
    [
      [
        "a:1",
        "b:1",
        "c.tar",
        "--rename",
        "docker.io/library/a=x",
        "--rename",
        "docker.io/library/b=x",
      ],
      /: --rename parts them/,
    ],
    [["--from", list], /DEST is missing: DEST is the last word/],
  ] as const) {
    const { exitCode, stderr } = await runCommand([...words], { cwd: folder });
    assert.notEqual(exitCode, 0);
    assert.match(stderr, says);
  }
  const environment = { HTTPS_PROXY: "http://[" };
  const { stderr } = await runCommand(["a.test/b:1", "c.tar"], { env: environment, cwd: folder });
  assert.match(stderr, /HTTPS_PROXY is not a URL: write http:\/\/HOST:PORT/);
});

test("an empty DEST is misuse", async () => {
  assert.equal((await runCommand(["alpine", ""])).exitCode, 2);
});

const IMAGE = makeImage();

test("what cannot be written to stdout is not a success", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(IMAGE, "team/app", "1.0");
  const tar = join(temporaryFolder(t), "a.tar");
  const args = ["-c", 'exec "$@" > /dev/full', "-", ...COMMAND, reference, tar, ...AMD64];
  const { exitCode, stderr } = await runCommand(args, { command: ["sh"] });
  assert.equal(exitCode, 1);
  assert.match(stderr, /cannot write stdout: the disk is full/);
});

test("a full disk behind stdout is told once, whatever was to be written", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(IMAGE, "team/app", "1.0");
  const full = "the disk is full";
  for (const [words, expected] of [
    [[reference, "-", ...AMD64, "-q"], `cannot write the stream: ${full}`],
    [[reference, "/dev/stdout", ...AMD64, "-q"], `cannot write the stream: ${full}`],
    [["--version"], `cannot write stdout: ${full}`],
    [["--list-tar", "none.tar"], "cannot read none.tar: no such file or directory"],
  ] as const) {
    const args = ["-c", 'exec "$@" > /dev/full', "-", ...COMMAND, ...words];
    const { exitCode, stderr } = await runCommand(args, { command: ["sh"] });
    assert.deepEqual([exitCode, stderr], [1, `imgpull: ${expected}\n`]);
  }
});

// Other people's programs between us and the image: a real squid, a real nginx before a real
// docker-registry with a password and an authority of its own, and a registry that is killed in
// mid-pull.
import assert from "node:assert/strict";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { makeAuthority } from "./support/certificates.ts";
import { type CommandOptions, runCommand, SECRETS, startCommand, USER } from "./support/command.ts";
import { makeImage, readTar, type TestImage } from "./support/image.ts";
import {
  interopFolder,
  type Nginx,
  type RealRegistry,
  type Squid,
  skipWithout,
  startNginx,
  startRealRegistry,
  startSquid,
} from "./support/interop.ts";

const skip = skipWithout("docker-registry", "nginx", "squid", "htpasswd");

const NAME = "registry.test"; // only squid knows where that is
const authority = makeAuthority();
const tls = authority.issueServer({ dns: ["localhost", NAME] });
const account = { user: USER, password: SECRETS.password };
const image = makeImage({ seed: "network", layers: [8192, 300_000] });

/**
 * By the distribution specification's own calls: no other program's push is part of these tests.
 */
async function push(host: string, content: TestImage): Promise<void> {
  const base = `http://${host}/v2/team/app`;
  const call = async (
    method: string,
    url: string,
    body?: Buffer,
    type = "application/octet-stream",
  ) => {
    const init = {
      method,
      headers: { "content-type": type },
      ...(body && { body: Uint8Array.from(body) }),
    };
    const response = await fetch(url, init);
    assert(response.ok, `${method} ${url}: ${response.status} ${await response.text()}`);
    return response.headers.get("location") ?? "";
  };
  for (const [digest, bytes] of content.blobs) {
    const location = new URL(await call("POST", `${base}/blobs/uploads/`), base);
    location.searchParams.set("digest", digest);
    await call("PUT", location.href, bytes);
  }
  await call("PUT", `${base}/manifests/1.0`, content.bytes, content.mediaType);
}

function assertHolds(tar: string, content: TestImage): void {
  const bytes = readFileSync(tar);
  const entries = new Map(readTar(bytes).map((entry) => [entry.name, entry]));
  for (const [digest, blob] of [...content.blobs, [content.digest, content.bytes] as const]) {
    const { offset, size } = entries.get(`blobs/${digest.replace(":", "/")}`) ?? {
      offset: 0,
      size: 0,
    };
    assert(bytes.subarray(offset, offset + size).equals(blob), digest);
  }
}

interface Stage {
  plain: RealRegistry;
  secured: RealRegistry;
  nginx: Nginx;
  before: Nginx;
  squid: Squid;
  ca: string;
}

describe("real programs", { skip, timeout: 300_000 }, () => {
  let stage: Stage;

  before(async () => {
    const ca = join(interopFolder("ca"), "ca.pem");
    writeFileSync(ca, authority.cert);
    const plain = await startRealRegistry();
    await push(plain.host, image);
    const secured = await startRealRegistry({ htpasswd: account, storage: plain.storage });
    const upstream = (port: number) => `http://127.0.0.1:${port}`;
    stage = {
      plain,
      secured,
      ca,
      nginx: await startNginx({ tls, htpasswd: account, upstream: upstream(plain.port) }),
      before: await startNginx({ tls, upstream: upstream(secured.port) }),
      squid: await startSquid({
        account: { user: USER, password: SECRETS.proxyPassword },
        hosts: { [NAME]: "127.0.0.1" },
      }),
    };
  });

  after(async () => {
    const { squid, nginx, before: second, secured, plain } = stage ?? {};
    for (const service of [squid, nginx, second, secured, plain]) await service?.stop();
  });

  interface Pulled {
    exitCode: number | null;
    stderr: string;
    tar: string;
  }

  async function pull(host: string, args: string[], options: CommandOptions = {}): Promise<Pulled> {
    const tar = join(interopFolder("pulled"), "image.tar");
    const words = [`${host}/team/app:1.0`, tar, "--platform", "linux/amd64", ...args];
    const { exitCode, stderr } = await runCommand(words, options);
    return { exitCode, stderr, tar };
  }

  function assertPulled({ exitCode, stderr, tar }: Pulled): void {
    assert.equal(exitCode, 0, stderr);
    assertHolds(tar, image);
  }

  function assertRefused({ exitCode, stderr, tar }: Pulled, ...words: RegExp[]): void {
    assert.equal(exitCode, 1, stderr);
    for (const word of words) assert.match(stderr, word);
    assert(stderr.trim().split("\n").length <= 3, stderr);
    assert(!existsSync(tar) && !existsSync(`${tar}.partial`));
  }

  // ====== nginx ======

  const stdin = `${SECRETS.password}\n`;
  const login = ["--user", USER, "--password-stdin"];

  for (const where of ["nginx", "before"] as const) {
    const who =
      where === "nginx"
        ? "nginx asks for the password"
        : "the registry behind nginx asks for the password";

    test(`${who}: given, in a docker configuration, or wrong`, async () => {
      const { host } = stage[where];
      const trust = ["--cacert", stage.ca];
      assertPulled(await pull(host, [...trust, ...login], { stdin }));
      const auth = Buffer.from(`${USER}:${SECRETS.password}`).toString("base64");
      const config = interopFolder("docker");
      writeFileSync(join(config, "config.json"), JSON.stringify({ auths: { [host]: { auth } } }));
      assertPulled(
        await pull(host, trust, { env: { DOCKER_CONFIG: config, SSL_CERT_FILE: stage.ca } }),
      );
      assertRefused(
        await pull(host, [...trust, "--user", USER, "--password", "wrong"]),
        /401/,
        /--user/,
      );
      assertRefused(await pull(host, trust), /401/, /no credentials were found/);
    });
  }

  test("nginx with an authority of its own: refused without it, taken with it or unchecked", async () => {
    const { host } = stage.nginx;
    assertRefused(await pull(host, login, { stdin }), /--cacert gives it/, /--insecure/);
    assertPulled(await pull(host, [...login, "--insecure"], { stdin }));
    assertPulled(await pull(host, login, { stdin, env: { SSL_CERT_FILE: stage.ca } }));
    assertRefused(await pull(host, ["--scheme", "http", "--retries", "0"]), /400/);
  });

  test("https from a registry that has none", async () => {
    assertRefused(await pull(stage.plain.host, ["--retries", "0"]), /--scheme http/);
  });

  // ====== squid ======

  function proxied(password: string): Record<string, string> {
    const url = stage.squid.url.replace("://", `://${USER}:${password}@`);
    return { HTTPS_PROXY: url, HTTP_PROXY: url };
  }

  test("squid, absolute form: every request goes through it", async () => {
    const host = `${NAME}:${stage.plain.port}`;
    assertPulled(await pull(host, ["--scheme", "http"], { env: proxied(SECRETS.proxyPassword) }));
    for (const digest of image.blobs.keys()) {
      await stage.squid.logged(new RegExp(`GET http://${host}/v2/team/app/blobs/${digest} `));
    }
  });

  test("squid, CONNECT: tunnels to nginx and on to the registry, with the passwords of all three", async () => {
    const host = `${NAME}:${stage.before.port}`;
    assertPulled(
      await pull(host, ["--cacert", stage.ca, ...login], {
        stdin,
        env: proxied(SECRETS.proxyPassword),
      }),
    );
    await stage.squid.logged(new RegExp(`CONNECT ${host} ${USER} `));
    assert(!stage.squid.log().includes(`GET http://${host}`));
  });

  test("squid refuses a wrong password, and none; the error says so in both forms", async () => {
    const { plain, nginx, squid, ca } = stage;
    for (const [port, args] of [
      [plain.port, ["--scheme", "http"]],
      [nginx.port, ["--cacert", ca]],
    ] as const) {
      for (const env of [
        proxied("guess-4711"),
        { HTTPS_PROXY: squid.url, HTTP_PROXY: squid.url },
      ]) {
        const refused = await pull(`${NAME}:${port}`, [...args], { env });
        assertRefused(refused, /proxy/, /407/, /USER:PASSWORD/);
        assert(!refused.stderr.includes("guess-4711"));
      }
    }
  });

  test("squid cannot reach the registry: the error is squid's 503", async () => {
    const env = proxied(SECRETS.proxyPassword);
    const nobody = `${NAME}:1`;
    assertRefused(
      await pull(nobody, ["--retries", "0"], { env }),
      /proxy.*CONNECT registry\.test:1: 503/,
    );
    assertRefused(await pull(nobody, ["--scheme", "http", "--retries", "0"], { env }), /503/);
  });

  test("NO_PROXY goes past squid", async () => {
    const env = { ...proxied(SECRETS.proxyPassword), NO_PROXY: ".test" };
    assertRefused(
      await pull(`${NAME}:${stage.plain.port}`, ["--scheme", "http"], { env }),
      /no such host/,
    );
    const seen = stage.squid.log();
    assertPulled(await pull(stage.plain.host, ["--scheme", "http"], { env }));
    assert.equal(stage.squid.log(), seen);
  });
});

// ====== A registry that dies ======

describe("a registry killed in mid-pull and started again", { skip, timeout: 300_000 }, () => {
  const heavy = makeImage({ seed: "heavy", layers: [8192, 64 * 1024 * 1024] });
  let registry: RealRegistry;
  let nginx: Nginx;

  before(async () => {
    registry = await startRealRegistry();
    await push(registry.host, heavy);
    nginx = await startNginx({ upstream: `http://127.0.0.1:${registry.port}` });
  });

  after(async () => {
    await nginx?.stop();
    await registry?.stop();
  });

  const ways: [name: string, host: () => string, signal: NodeJS.Signals][] = [
    ["killed outright", () => registry.host, "SIGKILL"],
    ["asked to end", () => registry.host, "SIGTERM"],
    ["killed behind nginx", () => nginx.host, "SIGKILL"],
  ];
  for (const [name, host, signal] of ways) {
    test(name, async () => {
      const tar = join(interopFolder("pulled"), "image.tar");
      let dying: Promise<void> | undefined;
      // The command is held while its registry dies, so that it cannot be done before: the small
      // blobs are there, and of the large one no more than its sockets hold.
      const args = [`${host()}/team/app:1.0`, tar, "--scheme", "http", "--platform", "linux/amd64"];
      const { child, result } = startCommand(args, {
        onStderr: () => {
          if (dying) return;
          child.kill("SIGSTOP");
          dying = registry
            .stop(signal)
            .then(() => {
              child.kill("SIGCONT");
              return registry.start();
            })
            .then(() => {});
        },
      });
      const { exitCode, stderr } = await result;
      await dying;
      assert.equal(exitCode, 0, stderr);
      assert.match(stderr, /trying again/, "it was done before the registry died");
      assertHolds(tar, heavy);
      assert(!existsSync(`${tar}.partial`));
    });
  }
});

// Proxies that nobody here wrote, in front of a test registry: tinyproxy with its 401, squid's own
// errors on plain HTTP, haproxy's TLS before a proxy; and in a proxy's place a SOCKS server and
// nginx. Also a TLS server without RFC 5746.
import assert from "node:assert/strict";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { makeAuthority } from "./support/certificates.ts";
import { COMMAND, runCommand, SECRETS, USER } from "./support/command.ts";
import { makeImage } from "./support/image.ts";
import {
  interopFolder,
  type Nginx,
  type Squid,
  skipWithout,
  startNginx,
  startSquid,
} from "./support/interop.ts";
import {
  besideLegacyTls,
  type ProxyService,
  startHaproxy,
  startMicrosocks,
  startTinyproxy,
} from "./support/interop-proxies.ts";
import { startRegistry } from "./support/registry.ts";

const skip = skipWithout("tinyproxy", "squid", "haproxy", "microsocks", "nginx", "htpasswd");
const account = { user: USER, password: SECRETS.proxyPassword };
const authority = makeAuthority();
const NAME = "registry.test"; // only squid knows where that is
const tls = authority.issueServer({ dns: ["localhost", NAME] });
const image = makeImage({ seed: "interop proxies", layers: [8192, 300_000] });

interface Stage {
  tinyproxy: ProxyService;
  squid: Squid;
  haproxy: ProxyService;
  socks: ProxyService;
  nginx: Nginx;
  ca: string;
}

describe("proxies that people run", { skip, timeout: 120_000 }, () => {
  let stage: Stage;

  before(async () => {
    const ca = join(interopFolder("ca"), "ca.pem");
    writeFileSync(ca, authority.cert);
    const squid = await startSquid({ account, hosts: { [NAME]: "127.0.0.1" } });
    stage = {
      ca,
      squid,
      tinyproxy: await startTinyproxy(account),
      haproxy: await startHaproxy(tls, squid.port),
      socks: await startMicrosocks(),
      nginx: await startNginx({ tls, upstream: `http://127.0.0.1:${squid.port}` }),
    };
  });

  after(async () => {
    const { tinyproxy, squid, haproxy, socks, nginx } = stage ?? {};
    for (const service of [tinyproxy, squid, haproxy, socks, nginx]) await service?.stop();
  });

  /** `password` undefined: none is given. */
  async function pull(
    reference: string,
    scheme: "http" | "https",
    proxy: string,
    password?: string,
  ) {
    const tar = join(interopFolder("pulled"), "image.tar");
    const login = password === undefined ? "" : `${USER}:${password}@`;
    const url = proxy.replace("://", `://${login}`);
    const options = ["--scheme", scheme, "--cacert", stage.ca, "--retries", "1"];
    const { exitCode, stderr } = await runCommand([reference, tar, ...options], {
      env: { HTTP_PROXY: url, HTTPS_PROXY: url },
      guardMs: 60_000,
    });
    assert(!stderr.includes("guess-4711"));
    return { exitCode, stderr, tar };
  }

  async function assertRefused(running: ReturnType<typeof pull>, ...words: (string | RegExp)[]) {
    const { exitCode, stderr, tar } = await running;
    assert.equal(exitCode, 1, stderr);
    for (const word of words)
      if (typeof word === "string") assert(stderr.includes(word), `no "${word}" in ${stderr}`);
      else assert.match(stderr, word);
    assert(!/trying again/.test(stderr), stderr);
    assert(stderr.trim().split("\n").length <= 3, stderr);
    assert(!existsSync(tar));
  }

  async function serve(t: Parameters<typeof startRegistry>[1], isSecure: boolean) {
    const registry = await startRegistry(isSecure ? { tls } : {}, t);
    const reference = registry.add(image, "team/app", "1.0").replace("127.0.0.1", NAME);
    return { registry, reference };
  }

  for (const scheme of ["http", "https"] as const) {
    test(`tinyproxy, ${scheme}: a wrong password is its 401, none its 407, both in its name`, async () => {
      const { host } = stage.tinyproxy;
      const reference = `${NAME}/team/app:1.0`;
      const name = `the proxy http://${host} refused`;
      const url = `http://${host}`;
      await assertRefused(pull(reference, scheme, url, "guess-4711"), name, "401", "USER:PASSWORD");
      await assertRefused(pull(reference, scheme, url), name, "407", "USER:PASSWORD");
    });

    test(`squid behind haproxy's TLS, ${scheme}: as https:// proxy`, async (t) => {
      const { registry, reference } = await serve(t, scheme === "https");
      const url = `https://localhost:${stage.haproxy.port}`;
      const { exitCode, stderr } = await pull(reference, scheme, url, account.password);
      assert.equal(exitCode, 0, stderr);
      assert.equal(registry.requests.length, 1 + image.blobs.size);
    });

    test(`what is no http:// proxy, ${scheme}: a SOCKS server, haproxy's and nginx's TLS`, async () => {
      const { socks, haproxy, nginx } = stage;
      const reference = `${NAME}/team/app:1.0`;
      await assertRefused(pull(reference, scheme, `http://${socks.host}`), "it speaks SOCKS");
      await assertRefused(pull(reference, scheme, `http://${haproxy.host}`), "it speaks TLS");
      const toNginx = pull(reference, scheme, `http://127.0.0.1:${nginx.port}`);
      await assertRefused(toNginx, "it speaks TLS");
    });

    test(`squid as https:// proxy, ${scheme}: it speaks plain HTTP`, async () => {
      const url = `https://127.0.0.1:${stage.squid.port}`;
      await assertRefused(pull(`${NAME}/team/app:1.0`, scheme, url), "it speaks plain HTTP");
    });
  }

  test("squid cannot reach the registry, or may not: its own answers on plain HTTP", async () => {
    const { port } = stage.squid;
    const url = `http://127.0.0.1:${port}`;
    const name = `the proxy ${url} refused GET http://`;
    const { exitCode, stderr } = await pull(`${NAME}:1/app:1`, "http", url, account.password);
    assert.equal(exitCode, 1);
    assert(stderr.includes(name) && stderr.includes(": 503"), stderr);
    assert.equal(stderr.match(/trying again/g)?.length, 1);
  });
});

const skipLegacy = skipWithout("gnutls-serv", "unshare", "ip");

test("a TLS server without RFC 5746 is spoken to", {
  skip: skipLegacy,
  timeout: 60_000,
}, async () => {
  const folder = interopFolder("legacy");
  const ca = join(folder, "ca.pem");
  writeFileSync(ca, authority.cert);
  const words = ["127.0.0.1:5556/team/app:1.0", join(folder, "x.tar"), "--retries", "0"];
  const [program, ...rest] = besideLegacyTls(tls, [...COMMAND, ...words, "--cacert", ca]);
  const { exitCode, stderr } = await runCommand(rest, { command: [program ?? ""] });
  assert.equal(exitCode, 1, stderr);
  // gnutls-serv answers with a page of its own: the handshake went well.
  assert.match(stderr, /this is not a manifest but text\/html/);
});

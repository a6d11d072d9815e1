// Section 6: one request. Redirects, certificates, proxies, silence, what is too large, what is
// encoded; that credentials stay with their origin is tested here for redirects and proxies, in
// auth.test.ts for tokens.
import assert from "node:assert/strict";
import { once } from "node:events";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { createServer as createHttpServer } from "node:http";
import { createServer as createTlsServer } from "node:https";
import { type AddressInfo, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { describe, test } from "node:test";
import type { TLSSocket } from "node:tls";
import { brotliCompressSync, gzipSync } from "node:zlib";
import { internals } from "../imgpull.ts";
import { type Identity, makeAuthority } from "./support/certificates.ts";
import {
  cleanEnvironment,
  runCommand,
  SECRETS,
  type TestScope,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import { makeArtifact, makeImage, makeMultiPlatform, type TestContent } from "./support/image.ts";
import { type ProxyOptions, startProxy } from "./support/proxy.ts";
import { assertFailed, assertPulled, tryPull } from "./support/pull.ts";
import { type Registry, type RegistryOptions, startRegistry } from "./support/registry.ts";

const HTTP = { scheme: "http" } as const;
const GIVEN = { username: USER, password: SECRETS.password };
const image = makeImage({ seed: "transport", layers: [8192, 8192] });
const authority = makeAuthority();
const tls = authority.issueServer();

/**
 * The time-out of these tests: long enough for an answer on a busy machine, which retries make up
 * for anyway.
 */
const SOON = 500;

async function serve(t: TestScope, options: RegistryOptions = {}) {
  const registry = await startRegistry(options, t);
  return { registry, reference: registry.add(image, "team/app", "1.0") };
}

/** Writes PEM texts into a folder; gives their paths. */
function pemFiles<Name extends string>(
  t: TestScope,
  texts: Record<Name, string>,
): Record<Name, string> {
  const folder = temporaryFolder(t);
  const paths = Object.entries<string>(texts).map(([name, text]) => {
    writeFileSync(join(folder, name), text);
    return [name, join(folder, name)];
  });
  return Object.fromEntries(paths) as Record<Name, string>;
}

const trust = (t: TestScope) => ({ caCert: pemFiles(t, { "ca.pem": authority.cert })["ca.pem"] });

// ====== Redirects ======

/**
 * The servers of signed URLs in the order of their requests, each with whether it was shown
 * credentials.
 */
function shownAt(registry: Registry): string[] {
  return registry
    .storageRequests()
    .map(({ server, headers }) => `${server} ${headers.authorization !== undefined}`);
}

describe("redirects", () => {
  for (const redirectStatus of [301, 302, 303, 307, 308]) {
    test(`${redirectStatus}: to storage without the credentials, within the registry with them`, async (t) => {
      const { registry, reference } = await serve(t, {
        auth: "basic",
        storage: { refuseAuthorization: false },
      });
      const away = registry.on({ kind: "layer" }, { redirect: "storage", redirectStatus });
      const within = registry.on({ kind: "config" }, { redirect: "self", redirectStatus });
      assertPulled(await tryPull(t, reference, { ...HTTP, ...GIVEN }), image);
      assert.deepEqual([away.hits, within.hits], [2, 1]);
      assert.deepEqual(shownAt(registry).sort(), [
        "registry true",
        "storage false",
        "storage false",
      ]);
    });
  }

  test("there and back again: each origin gets what is its own", async (t) => {
    const { registry, reference } = await serve(t, {
      auth: "basic",
      storage: { refuseAuthorization: false },
    });
    registry.on({ kind: "config" }, { redirect: "storage" });
    const back = registry.on(
      { kind: "storage", where: ({ server }) => server === "storage" },
      {
        redirect: ({ digest = "" }) => registry.url + registry.signedPath(digest),
      },
    );
    assertPulled(await tryPull(t, reference, { ...HTTP, ...GIVEN }), image);
    assert.equal(back.hits, 1);
    assert.deepEqual(shownAt(registry), ["storage false", "registry true"]);
  });

  test("ten are followed, the eleventh is not, and a circle ends", async (t) => {
    const hops = internals.LIMITS.redirects;
    const { registry, reference } = await serve(t);
    const again = ({ url }: { url: string }) => `${url}${url.includes("?") ? "&" : "?"}again`;
    const rule = registry.on({ kind: "manifest", times: hops }, { redirect: again });
    assertPulled(await tryPull(t, reference, HTTP), image);
    assert.equal(rule.hits, hops);
    registry.forget();
    registry.on({ kind: "manifest" }, { redirect: again });
    assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", `more than ${hops} redirects`);
    assert.equal(registry.requests.length, hops + 1);
  });

  test("never from https to http, whatever the host", async (t) => {
    const { registry, reference } = await serve(t, { tls, storage: { tls: false } });
    registry.on({ kind: "layer" }, { redirect: "storage" });
    const outcome = await tryPull(t, reference, trust(t));
    assertFailed(outcome, "PROTOCOL", "redirects to http:", "not followed from https");
    assert.deepEqual(outcome.waitsMs, []);
    assert.equal(registry.connections("storage"), 0);
  });

  test("from http to https, where the certificate is checked like any", async (t) => {
    const { registry, reference } = await serve(t, { storage: { tls } });
    registry.on({ kind: "layer" }, { redirect: "storage" });
    assertFailed(await tryPull(t, reference, HTTP), "TLS", registry.storageUrl);
    assertPulled(await tryPull(t, reference, { ...HTTP, ...trust(t) }), image);
  });

  test("what is not followed is told with both schemes", async (t) => {
    for (const [location, words] of [
      ["file:///etc/passwd", "not followed from http: to file:"],
      ["ftp://127.0.0.1/layer", "not followed from http: to ftp:"],
    ] as const) {
      const { registry, reference } = await serve(t);
      registry.on({ kind: "layer" }, { redirect: location });
      assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", words);
    }
  });

  test("bytes of UTF-8 in Location, as they are", async (t) => {
    const { registry, reference } = await serve(t);
    const paths: string[] = [];
    const digest = image.config.digest;
    const storage = createHttpServer(({ url = "" }, response) => {
      paths.push(url);
      response.end(image.blobs.get(digest));
    }).listen(0, "127.0.0.1");
    await once(storage, "listening");
    t.after(() => storage.close().closeAllConnections());
    const base = `http://127.0.0.1:${(storage.address() as AddressInfo).port}`;

    const wanted: [written: Buffer, asked: string][] = [
      [Buffer.from("/größe/图?q=ü"), "/gr%C3%B6%C3%9Fe/%E5%9B%BE?q=%C3%BC"],
      [Buffer.from("/gr%C3%B6%C3%9Fe"), "/gr%C3%B6%C3%9Fe"],
      [Buffer.from("/caf\xe9", "latin1"), "/caf%C3%A9"],
    ];
    for (const [written, asked] of wanted) {
      registry.on(
        { kind: "config", digest, times: 1 },
        { redirect: `${base}${written.toString("latin1")}` },
      );
      assertPulled(await tryPull(t, reference, HTTP), image);
      assert.equal(paths.at(-1), asked);
    }
  });

  test("to an address inside a network: for a registry's layers without credentials", async (t) => {
    const inside = createHttpServer(({ headers, url = "" }, response) => {
      shown.push(headers.authorization);
      response.end(image.blobs.get(url.slice(1)));
    }).listen(0, "127.0.0.2");
    const shown: (string | undefined)[] = [];
    await once(inside, "listening");
    t.after(() => inside.close().closeAllConnections());
    const { registry, reference } = await serve(t, { auth: "basic" });
    const base = `http://127.0.0.2:${(inside.address() as AddressInfo).port}`;
    registry.on({ kind: "layer" }, { redirect: ({ digest }) => `${base}/${digest}` });
    assertPulled(await tryPull(t, reference, { ...HTTP, ...GIVEN }), image);
    assert.deepEqual(shown, [undefined, undefined]);
  });

  const BAD_LOCATIONS = [
    "http://",
    "ftp://127.0.0.1/layer",
    "file:///etc/passwd",
    "javascript:1",
    "data:,layer",
  ];

  test("not to what is not a web address; the error has no signature", async (t) => {
    for (const location of [
      ...BAD_LOCATIONS,
      `ftp://127.0.0.1/?X-Amz-Signature=${SECRETS.signature}0`,
    ]) {
      const { registry, reference } = await serve(t);
      registry.on({ kind: "layer" }, { redirect: location });
      const outcome = await tryPull(t, reference, HTTP);
      assertFailed(outcome, "PROTOCOL", "redirects to");
      assert(!outcome.error?.message.includes(SECRETS.signature));
    }
  });

  test("a redirect without a Location is an error with its status", async (t) => {
    const { registry, reference } = await serve(t);
    registry.on({ kind: "manifest" }, { status: 302, body: "" });
    assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", "302");
  });

  test("a redirect whose own body never ends does not hold the pull up", async (t) => {
    const { registry, reference } = await serve(t);
    const location = {
      location: `${registry.storageUrl}${registry.signedPath(image.layers[0]?.digest ?? "")}`,
    };
    const first = { kind: "layer", digest: image.layers[0]?.digest ?? "" } as const;
    const rule = registry.on(first, {
      status: 307,
      body: "x".repeat(1000),
      headers: location,
      stallAfter: 10,
    });
    assertPulled(await tryPull(t, reference, HTTP), image);
    assert.equal(rule.hits, 1);
  });
});

// ====== Certificates ======

describe("the server's certificate", () => {
  const wrong: [name: string, identity: Identity, words: RegExp][] = [
    [
      "an authority that nobody knows",
      makeAuthority("stranger").issueServer(),
      /`caCert`.*`insecure`/,
    ],
    [
      "one that has expired",
      authority.issueServer({ notAfter: new Date("2021-01-01") }),
      /expired/,
    ],
    [
      "one that is not valid yet",
      authority.issueServer({ notBefore: new Date("2098-01-01") }),
      /not yet valid/,
    ],
    [
      "another name",
      authority.issueServer({ dns: ["other.test"], ip: [] }),
      /not for 127\.0\.0\.1 but for other\.test/,
    ],
  ];
  for (const [name, identity, words] of wrong) {
    test(`${name}: refused with the reason and not tried again, taken with --insecure`, async (t) => {
      const { registry, reference } = await serve(t, { tls: identity });
      const outcome = await tryPull(t, reference, trust(t));
      assertFailed(outcome, "TLS", words, `GET ${registry.url}/v2/team/app/manifests/1.0`);
      assert.deepEqual(
        [outcome.waitsMs, registry.connections("registry"), registry.requests.length],
        [[], 1, 0],
      );
      assertPulled(await tryPull(t, reference, { insecure: true }), image);
    });
  }

  const second = makeAuthority("second");
  const sources: [
    name: string,
    environment: (
      files: Record<"ca" | "both" | "junk", string>,
      folder: string,
    ) => Record<string, string>,
  ][] = [
    ["SSL_CERT_FILE", ({ ca }) => ({ SSL_CERT_FILE: ca })],
    ["SSL_CERT_FILE with several", ({ both }) => ({ SSL_CERT_FILE: both })],
    ["SSL_CERT_DIR, whatever else lies there", (_files, folder) => ({ SSL_CERT_DIR: folder })],
    [
      "SSL_CERT_DIR with several folders",
      (_files, folder) => ({ SSL_CERT_DIR: `/nowhere:${folder}` }),
    ],
    ["NODE_EXTRA_CA_CERTS", ({ ca }) => ({ NODE_EXTRA_CA_CERTS: ca })],
    [
      "NODE_EXTRA_CA_CERTS beside SSL_CERT_FILE",
      ({ ca, junk }) => ({ NODE_EXTRA_CA_CERTS: ca, SSL_CERT_FILE: junk }),
    ],
  ];
  for (const [name, environment] of sources) {
    test(`checked against ${name}`, async (t) => {
      const folder = temporaryFolder(t);
      mkdirSync(join(folder, "folder"));
      const texts = {
        ca: authority.cert,
        both: second.cert + authority.cert,
        junk: second.cert,
        readme: "no PEM",
      };
      for (const [file, text] of Object.entries(texts)) writeFileSync(join(folder, file), text);
      const files = {
        ca: join(folder, "ca"),
        both: join(folder, "both"),
        junk: join(folder, "junk"),
      };
      const { reference } = await serve(t, { tls });
      assertPulled(await tryPull(t, reference, { environment: environment(files, folder) }), image);
    });
  }

  test("SSL_CERT_FILE stands in place of the system's bundle, --cacert comes on top", async (t) => {
    const { reference } = await serve(t, { tls });
    const environment = { SSL_CERT_FILE: pemFiles(t, { junk: second.cert }).junk };
    assertFailed(await tryPull(t, reference, { environment }), "TLS", "`caCert`");
    assertPulled(await tryPull(t, reference, { environment, ...trust(t) }), image);
  });

  test("--cacert takes a bundle; a file that is missing or none is named", async (t) => {
    const { registry, reference } = await serve(t, { tls });
    const { bundle, none } = pemFiles(t, {
      bundle: `# ours\n${second.cert}\n${authority.cert}`,
      none: "not PEM",
    });
    assertPulled(await tryPull(t, reference, { caCert: bundle }), image);
    registry.forget();
    for (const caCert of [none, "/nowhere/ca.pem"]) {
      assertFailed(await tryPull(t, reference, { caCert }), "TLS", caCert);
    }
    assert.equal(registry.requests.length, 0);
  });

  test("the command, from the environment it runs in", async (t) => {
    const { reference } = await serve(t, { tls });
    const folder = temporaryFolder(t);
    const { "ca.pem": ca } = pemFiles(t, { "ca.pem": authority.cert });
    for (const [index, run] of [
      { env: { SSL_CERT_FILE: ca } },
      { env: { NODE_EXTRA_CA_CERTS: ca } },
    ].entries()) {
      const { exitCode, stderr } = await runCommand([reference, `${folder}/${index}.tar`], run);
      assert.equal(exitCode, 0, stderr);
    }
    const refused = await runCommand([reference, `${folder}/refused.tar`]);
    assert.equal(refused.exitCode, 1);
    assert.match(refused.stderr, /--cacert gives it, --insecure goes/);
    assert(!existsSync(`${folder}/refused.tar`));
  });
});

test("plain HTTP on an https port, and https on an http port, with the way out", async (t) => {
  const plain = createHttpServer((_request, response) => response.end()).listen(0, "127.0.0.1");
  await once(plain, "listening");
  t.after(() => plain.close().closeAllConnections());
  const outcome = await tryPull(t, `127.0.0.1:${(plain.address() as AddressInfo).port}/team/app:1`);
  assertFailed(outcome, "TLS", "plain HTTP", "`scheme` http");
  assert.deepEqual(outcome.waitsMs, []);
  // The words of Go's net/http, and so of docker-registry.
  const { registry, reference } = await serve(t);
  registry.on({}, { status: 400, body: "Client sent an HTTP request to an HTTPS server.\n" });
  assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", "400", "`scheme` http");
});

describe("client certificates", () => {
  const client = authority.issueClient({ commonName: "me" });
  const mutual = { ...tls, clientCa: authority.cert };

  test("with every request to the registry", async (t) => {
    const { registry, reference } = await serve(t, { tls: mutual, storage: { tls } });
    const { cert: tlsCert, key: tlsKey } = pemFiles(t, client);
    assertPulled(await tryPull(t, reference, { tlsCert, tlsKey, ...trust(t) }), image);
    assert.deepEqual(
      new Set(registry.requests.map(({ clientCertificate }) => clientCertificate)),
      new Set(["me"]),
    );
  });

  test("not to where the registry redirects, even if it is asked for there", async (t) => {
    const shown: unknown[] = [];
    const storage = createTlsServer(
      { ...tls, ca: authority.cert, requestCert: true, rejectUnauthorized: false },
      (request, response) => {
        shown.push((request.socket as TLSSocket).getPeerCertificate().subject?.CN);
        response.end(image.layers.find(({ digest }) => request.url === `/${digest}`)?.bytes);
      },
    );
    storage.listen(0, "127.0.0.1");
    await once(storage, "listening");
    t.after(() => storage.close().closeAllConnections());
    const { registry, reference } = await serve(t, { tls: mutual });
    const { port } = storage.address() as AddressInfo;
    registry.on(
      { kind: "layer" },
      { redirect: ({ digest }) => `https://127.0.0.1:${port}/${digest}` },
    );
    const { cert: tlsCert, key: tlsKey } = pemFiles(t, client);
    assertPulled(await tryPull(t, reference, { tlsCert, tlsKey, ...trust(t) }), image);
    assert.deepEqual(shown, [undefined, undefined]);
  });

  test("a registry that wants one and gets none: the error says so", async (t) => {
    const { registry, reference } = await serve(t, { tls: mutual, storage: { tls } });
    assertFailed(
      await tryPull(t, reference, { ...trust(t), retries: 0 }),
      "TLS",
      "`tlsCert` and `tlsKey`",
    );
    assert.equal(registry.requests.length, 0);
  });

  test("files that do not fit together, or are none, are named", async (t) => {
    const { reference } = await serve(t, { tls });
    const files = pemFiles(t, {
      cert: client.cert,
      key: client.key,
      other: authority.issueClient().key,
      none: "none",
    });
    const pairs = [
      [files.cert, files.other],
      [files.none, files.key],
      [files.cert, files.none],
      ["/nowhere", files.key],
    ];
    for (const [tlsCert = "", tlsKey = ""] of pairs) {
      assertFailed(
        await tryPull(t, reference, { tlsCert, tlsKey, ...trust(t) }),
        "TLS",
        /certificate|`tlsCert`|`tlsKey`|PEM/,
      );
    }
  });
});

describe("certs.d", () => {
  const client = authority.issueClient({ commonName: "from certs.d" });
  /** A certs.d with one folder. */
  function certsFolder(
    t: TestScope,
    host: string,
    files: Record<string, string>,
  ): { certsDirectory: string } {
    const certsDirectory = temporaryFolder(t);
    mkdirSync(join(certsDirectory, host));
    for (const [name, text] of Object.entries(files))
      writeFileSync(join(certsDirectory, host, name), text);
    return { certsDirectory };
  }

  test("HOST:PORT: *.crt are authorities, *.cert and *.key the client's, all else is left alone", async (t) => {
    const { registry, reference } = await serve(t, {
      tls: { ...tls, clientCa: authority.cert },
      storage: { tls },
    });
    const files = {
      "ca.crt": authority.cert,
      "client.cert": client.cert,
      "client.key": client.key,
      README: "x",
    };
    assertPulled(await tryPull(t, reference, certsFolder(t, registry.host, files)), image);
    assert.deepEqual(
      new Set(registry.requests.map(({ clientCertificate }) => clientCertificate)),
      new Set(["from certs.d"]),
    );
  });

  test("another host's is not used, and a broken one is named", async (t) => {
    const { registry, reference } = await serve(t, { tls });
    const other = certsFolder(t, "127.0.0.1:1", { "ca.crt": authority.cert });
    assertFailed(await tryPull(t, reference, other), "TLS", "`caCert`");
    const broken = certsFolder(t, registry.host, { "ca.crt": "none" });
    assertFailed(
      await tryPull(t, reference, broken),
      "TLS",
      join(broken.certsDirectory, registry.host, "ca.crt"),
    );
    assert.equal(registry.requests.length, 0);
  });
});

// ====== Proxies ======

/** A registry that only the proxy can reach, by name. */
async function behindProxy(
  t: TestScope,
  options: RegistryOptions = {},
  proxying: Partial<ProxyOptions> = {},
) {
  const named = {
    ...options,
    ...(options.tls && { tls: authority.issueServer({ dns: ["registry.test"] }) }),
  };
  const { registry } = await serve(t, named);
  const hosts = { "registry.test": "127.0.0.1", "storage.test": "127.0.0.1" };
  const proxy = await startProxy(t, { hosts, ...proxying });
  const host = registry.host.replace("127.0.0.1", "registry.test");
  return { registry, proxy, host, reference: `${host}/team/app:1.0` };
}

describe("proxies", () => {
  for (const proxyTls of [undefined, tls]) {
    const kind = proxyTls ? "an https:// proxy" : "an http:// proxy";
    const authenticated = { credentials: true, ...(proxyTls && { tls: proxyTls }) };

    test(`${kind}: CONNECT for https, and nothing of the proxy's reaches the registry`, async (t) => {
      const { registry, proxy, host, reference } = await behindProxy(
        t,
        { tls, auth: "basic" },
        authenticated,
      );
      const environment = { HTTPS_PROXY: proxy.urlWithCredentials };
      assertPulled(
        await tryPull(t, reference, { environment, ...GIVEN, ...trust(t), concurrency: 2 }),
        image,
      );
      const asked = new Set(proxy.requests.map(({ method, target }) => `${method} ${target}`));
      assert.deepEqual(asked, new Set([`CONNECT ${host}`]));
      assert(proxy.requests.length <= 2, "tunnels are kept");
      assert(proxy.requests.every(({ headers }) => headers.authorization === undefined));
      assert(
        registry.requests.every(({ headers }) => headers["proxy-authorization"] === undefined),
      );
      assert(registry.requests.every(({ headers }) => headers.host === host));
    });

    test(`${kind}: absolute form for http`, async (t) => {
      const { registry, proxy, host, reference } = await behindProxy(t, {}, authenticated);
      const environment = { HTTP_PROXY: proxy.urlWithCredentials };
      assertPulled(
        await tryPull(t, reference, { ...HTTP, environment, namespace: "quay.io", ...trust(t) }),
        image,
      );
      assert.deepEqual(
        proxy.requests.map(({ target }) => target).sort(),
        registry.requests.map(({ url }) => `http://${host}${url}`).sort(),
      );
      assert.equal(registry.requests[0]?.query.get("ns"), "quay.io");
      const shown = registry.requests.map(
        ({ headers }) => headers.authorization ?? headers["proxy-authorization"],
      );
      assert.deepEqual(
        new Set(shown),
        new Set([undefined]),
        "the proxy's credentials are not the registry's",
      );
      assert(registry.requests.every(({ headers }) => headers.host === host));
    });
  }

  test("credentials are decoded from the proxy's URL, and a proxy that wants some says 407", async (t) => {
    for (const options of [{}, { tls }]) {
      const { proxy, reference } = await behindProxy(t, options, { credentials: true });
      const name = options.tls ? "HTTPS_PROXY" : "HTTP_PROXY";
      const given = options.tls ? trust(t) : HTTP;
      const encoded = proxy.urlWithCredentials.replace(SECRETS.proxyPassword, (text) =>
        text.replace(/[-p]/g, (letter) => `%${letter.charCodeAt(0).toString(16)}`),
      );
      assertPulled(
        await tryPull(t, reference, { ...given, environment: { [name]: encoded } }),
        image,
      );
      const wrong = proxy.url.replace("://", "://tester:guess-4711@");
      for (const url of [proxy.url, wrong]) {
        const outcome = await tryPull(t, reference, { ...given, environment: { [name]: url } });
        assertFailed(outcome, "PROXY", "407", /proxy/);
        assert(!outcome.error?.message.includes("guess-4711"));
        assert.deepEqual(outcome.waitsMs, []);
      }
    }
  });

  test("redirects go through the proxy too, without the registry's credentials", async (t) => {
    const { registry, proxy, reference } = await behindProxy(t, { auth: "basic" });
    const storageUrl = registry.storageUrl.replace("127.0.0.1", "storage.test");
    registry.on(
      { kind: "layer" },
      { redirect: ({ digest = "" }) => storageUrl + registry.signedPath(digest) },
    );
    const environment = { HTTP_PROXY: proxy.url };
    assertPulled(await tryPull(t, reference, { ...HTTP, environment, ...GIVEN }), image);
    assert.equal(proxy.requests.filter(({ target }) => target.includes("storage.test")).length, 2);
    assert(registry.storageRequests().every(({ headers }) => headers.authorization === undefined));
  });

  test("loopback is never sent through a proxy", async (t) => {
    const proxy = await startProxy(t, {
      hosts: { localhost: "127.0.0.1", "127.0.0.1": "127.0.0.1" },
    });
    const { reference } = await serve(t);
    for (const name of [reference, reference.replace("127.0.0.1", "localhost")]) {
      const environment = { HTTP_PROXY: proxy.url, ALL_PROXY: proxy.url };
      assertPulled(await tryPull(t, name, { ...HTTP, environment }), image);
    }
    assert.deepEqual(proxy.requests, []);
  });

  test("a proxy that fails for a while is asked again", async (t) => {
    for (const options of [{}, { tls }]) {
      for (const fault of [502, 503, "close"] as const) {
        const { proxy, reference } = await behindProxy(t, options, { fault, faults: 1 });
        const environment = { HTTP_PROXY: proxy.url, HTTPS_PROXY: proxy.url };
        const outcome = await tryPull(t, reference, {
          ...(options.tls ? trust(t) : HTTP),
          environment,
        });
        assertPulled(outcome, image);
        assert.equal(outcome.waitsMs.length, 1, `${fault}`);
      }
    }
  });

  test("a proxy that refuses, is silent, or is not there, is named, without its password", async (t) => {
    const closed = await startProxy(t, { hosts: {} });
    await closed.close();
    const faults = [
      ["PROXY", 403],
      ["TIMEOUT", "silent"],
    ] as const;
    for (const [code, fault] of faults) {
      const { proxy, reference } = await behindProxy(t, { tls }, { fault });
      const given = { ...trust(t), timeoutMs: SOON, retries: 0 };
      const environment = { HTTPS_PROXY: proxy.urlWithCredentials };
      assertFailed(await tryPull(t, reference, { environment, ...given }), code, proxy.host);
    }
    const environment = { ALL_PROXY: closed.urlWithCredentials };
    for (const given of [{}, HTTP]) {
      const outcome = await tryPull(t, "registry.test/team/app:1", {
        ...given,
        environment,
        retries: 0,
      });
      assertFailed(outcome, "NETWORK", closed.host);
    }
  });

  test("another kind of proxy is an error that names it", async (t) => {
    for (const [url, words] of [
      ["socks5://127.0.0.1:1080", /socks5:/],
      ["http://[", /not a URL/],
    ] as const) {
      assertFailed(
        await tryPull(t, "registry.test/app:1", { environment: { ALL_PROXY: url } }),
        "PROXY",
        words,
      );
    }
  });
});

const PROXIES: [
  name: string,
  url: string,
  environment: Record<string, string>,
  proxy: string | undefined,
][] = [
  [
    "https",
    "https://r.test/",
    { HTTPS_PROXY: "http://s:1", HTTP_PROXY: "http://h:1" },
    "http://s:1/",
  ],
  [
    "http",
    "http://r.test/",
    { HTTPS_PROXY: "http://s:1", HTTP_PROXY: "http://h:1" },
    "http://h:1/",
  ],
  ["lower case", "https://r.test/", { https_proxy: "http://s:1" }, "http://s:1/"],
  [
    "ALL_PROXY for want of another",
    "https://r.test/",
    { ALL_PROXY: "http://a:1", HTTP_PROXY: "http://h:1" },
    "http://a:1/",
  ],
  [
    "all_proxy after HTTP_PROXY",
    "http://r.test/",
    { all_proxy: "http://a:1", HTTP_PROXY: "http://h:1" },
    "http://h:1/",
  ],
  ["no scheme", "https://r.test/", { HTTPS_PROXY: "p.test:3128" }, "http://p.test:3128/"],
  ["an empty one", "https://r.test/", { HTTPS_PROXY: "" }, undefined],
  ["no_proxy", "https://r.test/", { HTTPS_PROXY: "http://s:1", no_proxy: "r.test" }, undefined],
  ["none", "https://r.test/", {}, undefined],
];

test("which variable names the proxy", () => {
  for (const [name, url, environment, proxy] of PROXIES) {
    assert.equal(internals.proxyFor(new URL(url), environment)?.href, proxy, name);
  }
});

const NO_PROXY: [host: string, entries: string, exempt: boolean][] = [
  ["r.test", "", false],
  ["r.test", "*", true],
  ["r.test", "r.test", true],
  ["r.test", "R.TEST", true],
  ["a.r.test", "r.test", true],
  ["a.r.test", ".r.test", true],
  ["a.r.test", "*.r.test", true],
  ["ar.test", "r.test", false],
  ["r.test", "a.r.test", false],
  ["r.test", "test", true],
  ["r.test", "x.test, r.test", true],
  ["r.test", "x.test r.test", true],
  ["r.test", ",,r.test,", true],
  ["r.test:5000", "r.test:5000", true],
  ["r.test:5000", "r.test:5001", false],
  ["r.test", "r.test:443", true],
  ["r.test:5000", "r.test", true],
  ["10.1.2.3", "10.0.0.0/8", true],
  ["10.1.2.3", "11.0.0.0/8", false],
  ["10.1.2.3", "10.1.2.3", true],
  ["10.1.2.3", "10.1.2.3/32", true],
  ["10.1.2.3:5000", "10.1.2.3:5000", true],
  ["10.1.2.3", "1.2.3", false],
  ["10.1.2.3", "10.0.0.0/99", false],
  ["[2001:db8::1]", "2001:db8::/32", true],
  ["[2001:db8::1]:5000", "2001:db8::1", true],
  ["[2001:db8::1]", "10.0.0.0/8", false],
  ["[2001:db8::1]:5000", "[2001:db8::1]:5000", true],
  ["[2001:db8::1]:5000", "[2001:db8::1]:1", false],
  ["localhost:5000", "", true],
  ["127.0.0.1", "", true],
  ["127.9.9.9", "", true],
  ["[::1]:5000", "", true],
  ["localhost.test", "", false],
];

test("NO_PROXY: names with their subdomains, ports, addresses, blocks; loopback always", () => {
  for (const [host, entries, exempt] of NO_PROXY) {
    assert.equal(
      internals.isExemptFromProxy(new URL(`https://${host}/`), entries),
      exempt,
      `${host} by "${entries}"`,
    );
  }
});

// ====== Silence ======

describe("silence", { concurrency: 8 }, () => {
  const places: [name: string, matcher: object, fault: object, auth: "none" | "bearer"][] = [
    ["before a manifest", { kind: "manifest" }, { wait: new Promise(() => {}) }, "none"],
    ["within a manifest", { kind: "manifest" }, { stallAfter: 100 }, "none"],
    ["before a token", { kind: "token" }, { wait: new Promise(() => {}) }, "bearer"],
    ["within a config", { kind: "config" }, { stallAfter: 100 }, "none"],
    ["before a layer", { kind: "layer" }, { wait: new Promise(() => {}) }, "none"],
    ["within a layer", { kind: "layer" }, { stallAfter: 100 }, "none"],
    [
      "within the body of an error",
      { kind: "layer" },
      { status: 503, body: "x".repeat(1000), stallAfter: 10 },
      "none",
    ],
  ];
  for (const [name, matcher, fault, auth] of places) {
    test(`${name} is a fault like any: tried again, and said in the end`, async (t) => {
      const { registry, reference } = await serve(t, { auth });
      const once = registry.on({ ...matcher, times: 1 }, fault);
      const outcome = await tryPull(t, reference, { ...HTTP, timeoutMs: SOON });
      assertPulled(outcome, image);
      assert.equal(once.hits, 1);
      assert(outcome.waitsMs.length >= 1);
      const always = registry.on(matcher, fault);
      const failed = await tryPull(t, reference, { ...HTTP, timeoutMs: SOON, retries: 1 });
      assertFailed(failed, name.endsWith("error") ? "PROTOCOL" : "TIMEOUT");
      assert(always.hits >= 2);
    });
  }

  async function silentServer(t: TestScope): Promise<{ silent: string; asked: Promise<unknown> }> {
    const sockets = new Set<Socket>();
    const server = createServer((socket) => sockets.add(socket.on("error", () => {}))).listen(
      0,
      "127.0.0.1",
    );
    await once(server, "listening");
    t.after(() => {
      server.close();
      for (const socket of sockets) socket.destroy();
    });
    return {
      silent: `127.0.0.1:${(server.address() as AddressInfo).port}`,
      asked: once(server, "connection"),
    };
  }

  test("of a server that takes the connection and no more: with and without TLS, and behind a proxy", async (t) => {
    const { silent } = await silentServer(t);
    const proxy = await startProxy(t, { hosts: { "registry.test": silent } });
    const environment = { HTTPS_PROXY: proxy.url, HTTP_PROXY: proxy.url };
    for (const host of [silent, "registry.test"]) {
      for (const given of [{}, HTTP]) {
        const outcome = await tryPull(t, `${host}/app:1`, {
          ...given,
          environment,
          timeoutMs: SOON,
          retries: 1,
        });
        assertFailed(outcome, "TIMEOUT", /nothing came for|silent/);
        assert.equal(outcome.waitsMs.length, 1);
      }
    }
    assert.equal(proxy.requests.length, 4);
  });

  test("Ctrl-C does not wait for it to end", async (t) => {
    const { silent, asked } = await silentServer(t);
    const mute = await startProxy(t, { hosts: {}, fault: "silent" });
    const tar = join(temporaryFolder(t), "image.tar");
    const places = [
      [silent, {}, asked],
      ["registry.test", { HTTPS_PROXY: mute.url }, mute.asked],
    ] as const;
    for (const [host, env, connected] of places) {
      const interrupt = new AbortController();
      void connected.then(() => interrupt.abort());
      const { exitCode } = await runCommand([`${host}/app:1`, tar, "--timeout", "50"], {
        env,
        signal: interrupt.signal,
        guardMs: 20_000,
      });
      assert.equal(exitCode, 130);
    }
  });
});

// ====== Caps ======

describe("what is too large is refused by name, in bounded memory", () => {
  const { manifestBytes, tokenBytes } = internals.LIMITS;
  const HUGE = 64 * 1024 * 1024;
  const huge = Buffer.alloc(HUGE, " ");
  const caps: [name: string, matcher: object, fault: object, words: RegExp][] = [
    [
      "a manifest",
      { kind: "manifest" },
      { body: huge },
      new RegExp(`manifest.*larger than ${manifestBytes}`),
    ],
    [
      "a manifest of untold length",
      { kind: "manifest" },
      { body: huge, contentLength: "chunked" },
      /manifest.*larger/,
    ],
    [
      "a manifest that is small until it is unpacked",
      { kind: "manifest" },
      { body: huge, contentEncoding: "gzip" },
      /manifest.*larger/,
    ],
    ["a token", { kind: "token" }, { body: huge }, new RegExp(`token.*larger than ${tokenBytes}`)],
    [
      "a token of untold length",
      { kind: "token" },
      { body: huge, contentLength: "chunked" },
      /token.*larger/,
    ],
  ];
  for (const [name, matcher, fault, words] of caps) {
    test(name, async (t) => {
      const { registry, reference } = await serve(t, { auth: "bearer" });
      const rule = registry.on(matcher, fault);
      const outcome = await tryPull(t, reference, HTTP);
      assertFailed(outcome, "TOO_LARGE", words);
      assert.deepEqual([rule.hits, outcome.waitsMs], [1, []]);
      await registry.settled();
      const read = Math.max(...registry.requests.map(({ bytesSent }) => bytesSent));
      assert(read < HUGE / 2, `${read} bytes were taken`);
    });
  }

  test("the body of an error: its status is told all the same", async (t) => {
    for (const contentLength of [0, "chunked"] as const) {
      const { registry, reference } = await serve(t);
      registry.on({ kind: "manifest" }, { status: 404, body: huge, contentLength });
      assertFailed(await tryPull(t, reference, HTTP), "NOT_FOUND", "404");
      await registry.settled();
      assert((registry.requests[0]?.bytesSent ?? HUGE) < HUGE / 2);
    }
  });

  test("headers", async (t) => {
    const { registry, reference } = await serve(t);
    registry.on({ kind: "manifest" }, { headers: { "x-large": "x".repeat(2_000_000) } });
    const outcome = await tryPull(t, reference, HTTP);
    assertFailed(outcome, "PROTOCOL", "manifests/1.0", /headers are larger than 1048576 bytes/);
    assert.deepEqual(outcome.waitsMs, []);
  });
});

// ====== Encodings ======

describe("content encodings", () => {
  const encodings: [name: string, encode: (bytes: Buffer) => Buffer][] = [
    ["gzip", gzipSync],
    ["x-gzip", gzipSync],
    ["GZIP", gzipSync],
    ["identity", (bytes) => bytes],
  ];
  for (const [name, encode] of encodings) {
    test(`${name}, though identity was asked for`, async (t) => {
      const { registry, reference } = await serve(t);
      const bodies = [[image.digest, image.bytes], ...image.blobs] as [string, Buffer][];
      for (const [digest, bytes] of bodies) {
        registry.on({ digest }, { body: encode(bytes), headers: { "content-encoding": name } });
      }
      assertPulled(await tryPull(t, reference, HTTP), image);
      const asked = registry.requests.map(({ headers }) => headers["accept-encoding"]);
      assert.deepEqual(new Set(asked), new Set(["identity"]));
    });
  }

  const labels: [name: string, headers: Record<string, string>, encode: typeof gzipSync][] = [
    ["a label that lies", { "content-encoding": "gzip" }, ((bytes: Buffer) => bytes) as never],
    ["no label", {}, gzipSync],
  ];
  for (const [name, headers, encode] of labels) {
    for (const contentLength of [0, "chunked"] as const) {
      test(`${name} (length: ${contentLength || "told"}): the digest decides`, async (t) => {
        const { registry, reference } = await serve(t, { auth: "bearer" });
        const laid = { headers, contentLength };
        for (const { digest, bytes } of [image, { ...image.config, bytes: image.configBytes }])
          registry.on({ digest }, { body: encode(bytes), ...laid });
        registry.on({ kind: "token" }, { headers, contentLength });
        assertPulled(await tryPull(t, reference, HTTP), image);
      });
    }
  }

  test("a label that lies on a config and its manifest below an index, and on the words of an error", async (t) => {
    const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
    const registry = await startRegistry({}, t);
    const reference = registry.add(index, "team/app", "1.0");
    const headers = { "content-encoding": "gzip" };
    const isDocument = ({ kind }: { kind: string }) => kind !== "layer";
    const rule = registry.on({ where: isDocument }, { headers, contentLength: "chunked" });
    assertPulled(await tryPull(t, reference, HTTP), index.children[0] as TestContent);
    assert.equal(rule.hits, 3);

    rule.remove();
    registry.on({}, { status: 403, headers, body: "not for you" });
    assertFailed(await tryPull(t, reference, HTTP), "FORBIDDEN", "(not for you)");
  });

  test("a config that is gzip itself is what its digest says", async (t) => {
    const bytes = gzipSync("a config of its own kind");
    const artifact = makeArtifact({
      configMediaType: "application/x",
      configBytes: bytes,
      layers: [],
    });
    const registry = await startRegistry({}, t);
    const reference = registry.add(artifact, "team/app", "1.0");
    for (const headers of [{}, { "content-encoding": "gzip" }]) {
      const rule = registry.on({ kind: "config" }, { headers });
      assertPulled(await tryPull(t, reference, HTTP), artifact);
      assert.equal(rule.hits, 1);
      rule.remove();
    }
  });

  test("a body that is not what it says, or in an encoding unheard of, never becomes DEST", async (t) => {
    for (const kind of ["manifest", "config", "layer"] as const) {
      for (const encoding of ["gzip", "br", "rot13"]) {
        const { registry, reference } = await serve(t);
        registry.on(
          { kind },
          { headers: { "content-encoding": encoding }, body: brotliCompressSync("other bytes") },
        );
        const outcome = await tryPull(t, reference, HTTP);
        assert(outcome.error);
        assert(!existsSync(outcome.tar));
      }
    }
  });
});

test("the requests of a pull say who asks, and nothing of this machine", async (t) => {
  const { registry, reference } = await serve(t);
  assertPulled(await tryPull(t, reference, HTTP), image);
  for (const { headers } of registry.requests) {
    assert.match(headers["user-agent"] ?? "", /^imgpull\/\d+\.\d+\.\d+$/);
    const telling = ["cookie", "referer", "from", "authorization"];
    assert.deepEqual(
      Object.keys(headers).filter((name) => telling.includes(name)),
      [],
    );
    assert(!JSON.stringify(headers).includes(cleanEnvironment().HOME ?? "no home"));
  }
});

// ====== What else a peer may do ======

const IMAGE = makeImage();
const AMD64 = ["--scheme", "http", "--platform", "linux/amd64", "-q"];

test("a 101 that nobody asked for is a failure with words, not an end without any", async (t) => {
  const server = createServer((socket) => {
    socket.on("error", () => undefined);
    socket.once("data", () =>
      socket.end("HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"),
    );
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close());
  const { port } = server.address() as { port: number };
  const args = [
    `127.0.0.1:${port}/app:1`,
    join(temporaryFolder(t), "a.tar"),
    ...AMD64,
    "--retries",
    "0",
  ];
  const { exitCode, stderr } = await runCommand(args);
  assert.equal(exitCode, 1);
  assert.match(stderr, /closed without an answer/);
});

test("the client certificate is not shown to the token service of a redirect's target", async (t) => {
  const authority = makeAuthority();
  const server = authority.issueServer();
  const client = authority.issueClient({ commonName: "client" });
  const registry = await startRegistry({ tls: { ...server, clientCa: authority.cert } }, t);
  const other = await startRegistry(
    { tls: { ...server, clientCa: authority.cert, clientOptional: true }, auth: "bearer" },
    t,
  );
  const folder = temporaryFolder(t);
  const file = (name: string, text: string) => {
    writeFileSync(join(folder, name), text);
    return join(folder, name);
  };
  const caCert = file("ca.pem", authority.cert);
  const [tlsCert, tlsKey] = [file("cert.pem", client.cert), file("key.pem", client.key)];
  const reference = registry.add(IMAGE, "team/app", "1.0");
  other.add(IMAGE, "team/app", "1.0");
  registry.on({ kind: "manifest" }, { redirect: (record) => new URL(record.path, other.url).href });
  await tryPull(t, reference, { scheme: "https", caCert, tlsCert, tlsKey, retries: 0 });
  const shown = [registry, other].map(({ requests }) =>
    requests.map(({ clientCertificate }) => clientCertificate),
  );
  assert.ok(other.requests.length > 0, "the redirect was followed");
  assert.ok(shown[0]?.includes("client"), "the registry itself was shown it");
  assert.ok(!shown[1]?.includes("client"), "the target was not");
});

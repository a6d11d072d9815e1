// Section 6, certificates: whom imgpull trusts beside whole authorities, what one unreadable
// certificate costs, and the words for what a user has named wrongly. The servers are real; nothing
// is asked of one that is not trusted.
import assert from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { mkdirSync, writeFileSync } from "node:fs";
import { createServer, type ServerOptions } from "node:https";
import { join } from "node:path";
import { describe, test } from "node:test";
import { type Identity, makeAuthority } from "./support/certificates.ts";
import { type TestScope, temporaryFolder } from "./support/command.ts";
import { makeImage } from "./support/image.ts";
import { startProxy } from "./support/proxy.ts";
import { assertFailed, assertPulled, type PullOptions, tryPull } from "./support/pull.ts";
import { relay, startRawServer } from "./support/raw.ts";
import { startRegistry } from "./support/registry.ts";

const image = makeImage({ seed: "trust", layers: [8192] });
const authority = makeAuthority("root");
const intermediate = authority.issueAuthority("intermediate");
const leaf = intermediate.issueServer();
const stranger = makeAuthority("stranger");

const chained: Identity = { key: leaf.key, cert: leaf.cert + intermediate.cert };

/** Of the right form, and no certificate. */
const BROKEN = `-----BEGIN CERTIFICATE-----\n${"AAAA".repeat(16)}\n-----END CERTIFICATE-----\n`;
const UNENDED = `-----BEGIN CERTIFICATE-----\n${"MIIB".repeat(16)}\n`;
const REQUEST = authority.cert.replaceAll("CERTIFICATE", "CERTIFICATE REQUEST");

function write(t: TestScope, name: string, text: string): string {
  const file = join(temporaryFolder(t), name);
  writeFileSync(file, text);
  return file;
}

/** A folder of files, in which `folder` may be a part of it. */
function writeFolder(t: TestScope, folder: string, files: Record<string, string>): string {
  const top = temporaryFolder(t);
  mkdirSync(join(top, folder), { recursive: true });
  for (const [name, text] of Object.entries(files)) writeFileSync(join(top, folder, name), text);
  return top;
}

async function serve(t: TestScope, tls: Identity) {
  const registry = await startRegistry({ tls }, t);
  return { registry, reference: registry.add(image, "team/app", "1.0") };
}

/** The ways in which a certificate is named. */
const WAYS: [
  name: string,
  trust: (t: TestScope, pem: string, host: string) => Partial<PullOptions>,
][] = [
  ["caCert", (t, pem) => ({ caCert: write(t, "ca.pem", pem) })],
  ["SSL_CERT_FILE", (t, pem) => ({ environment: { SSL_CERT_FILE: write(t, "ca.pem", pem) } })],
  [
    "SSL_CERT_DIR",
    (t, pem) => ({ environment: { SSL_CERT_DIR: writeFolder(t, ".", { "ca.pem": pem }) } }),
  ],
  [
    "NODE_EXTRA_CA_CERTS",
    (t, pem) => ({ environment: { NODE_EXTRA_CA_CERTS: write(t, "ca.pem", pem) } }),
  ],
  ["certs.d", (t, pem, host) => ({ certsDirectory: writeFolder(t, host, { "ca.crt": pem }) })],
];

describe("an intermediate or the server's own certificate is trust enough", () => {
  for (const [way, trust] of WAYS) {
    test(way, async (t) => {
      for (const [tls, pem] of [
        [chained, authority.cert],
        [chained, intermediate.cert],
        [leaf, intermediate.cert],
        [chained, leaf.cert],
        [leaf, leaf.cert],
      ] as const) {
        const { registry, reference } = await serve(t, tls);
        assertPulled(await tryPull(t, reference, trust(t, pem, registry.host)), image);
      }
    });
  }

  test("but no more than that: another authority's, another server's, another name's", async (t) => {
    const elsewhere = intermediate.issueServer({ dns: ["other.test"], ip: [] });
    for (const [tls, pem, words] of [
      [leaf, authority.cert, /certificate authority is not known/],
      [chained, stranger.cert, /certificate authority is not known/],
      [chained, authority.issueAuthority("other").cert, /certificate authority is not known/],
      [chained, intermediate.issueServer().cert, /certificate authority is not known/],
      [elsewhere, elsewhere.cert, /not for 127\.0\.0\.1 but for other\.test/],
    ] as const) {
      const { registry, reference } = await serve(t, tls);
      const outcome = await tryPull(t, reference, { caCert: write(t, "ca.pem", pem) });
      assertFailed(outcome, "TLS", words);
      assert.deepEqual([registry.requests.length, outcome.waitsMs], [0, []]);
    }
  });
});

describe("one certificate that cannot be read hides no other", () => {
  const bundles: [name: string, pem: string][] = [
    ["before it", BROKEN + authority.cert],
    ["after it", authority.cert + BROKEN],
    ["without an end", UNENDED + authority.cert],
    ["between, beside a key and a request", stranger.cert + BROKEN + REQUEST + authority.cert],
    ["with words before it", `# Bag Attributes\n${BROKEN}\nsubject=root\n${authority.cert}`],
  ];
  for (const [name, pem] of bundles) {
    test(`in a bundle, ${name}`, async (t) => {
      for (const [way, trust] of WAYS) {
        const { registry, reference } = await serve(t, chained);
        const outcome = await tryPull(t, reference, trust(t, pem, registry.host));
        assert.equal(outcome.error, undefined, way);
      }
    });
  }

  test("in a folder", async (t) => {
    const { registry, reference } = await serve(t, chained);
    const files = {
      "0.crt": BROKEN,
      "1.crt": "none",
      "2.crt": authority.cert,
      "3.crt": UNENDED,
      "4.crt": leaf.key,
    };
    const folder = { environment: { SSL_CERT_DIR: writeFolder(t, ".", files) } };
    assertPulled(await tryPull(t, reference, folder), image);
    const certsDirectory = writeFolder(t, registry.host, files);
    assertPulled(await tryPull(t, reference, { certsDirectory }), image);
  });

  test("but a file that the user names must have one that can be read", async (t) => {
    const { registry, reference } = await serve(t, chained);
    for (const pem of [BROKEN, UNENDED, leaf.key, REQUEST]) {
      const caCert = write(t, "ca.pem", pem);
      assertFailed(
        await tryPull(t, reference, { caCert }),
        "TLS",
        `\`caCert\` ${caCert} has no certificate that can be read`,
      );
    }
    const certsDirectory = writeFolder(t, registry.host, { "0.crt": BROKEN, "1.crt": leaf.key });
    assertFailed(await tryPull(t, reference, { certsDirectory }), "TLS", "0.crt", "1.crt");
    assert.equal(registry.requests.length, 0);
  });
});

describe("a certificate for another name says which it is for, and what to do", () => {
  const many = Array.from({ length: 12 }, (_, index) => `host-${index}.test`);
  const cases: [name: string, options: { dns: string[]; ip: string[] }, words: RegExp][] = [
    ["one name", { dns: ["registry.test"], ip: [] }, /127\.0\.0\.1 but for registry\.test$/m],
    [
      "a name and an address",
      { dns: ["*.test"], ip: ["10.0.0.1"] },
      /but for \*\.test, 10\.0\.0\.1$/m,
    ],
    ["many", { dns: many, ip: [] }, /but for host-0\.test, .*host-7\.test …$/m],
    ["none", { dns: [], ip: [] }, /but for no name at all$/m],
  ];
  for (const [name, options, words] of cases) {
    test(name, async (t) => {
      const { registry, reference } = await serve(t, authority.issueServer(options));
      const outcome = await tryPull(t, reference, { caCert: write(t, "ca.pem", authority.cert) });
      assertFailed(outcome, "TLS", words, "use a name that it is for", "`insecure`");
      assert.deepEqual([registry.requests.length, outcome.waitsMs], [0, []]);
    });
  }
});

test("addresses in brackets are checked against the certificate's, a proxy's too", async (t) => {
  const tls = authority.issueServer({ dns: [], ip: ["::1"] });
  const ca = { caCert: write(t, "ca.pem", authority.cert) };
  const plain = await startRegistry({}, t);
  plain.add(image, "team/app", "1.0");
  const forward = async (socket: NodeJS.WritableStream, request: Parameters<typeof relay>[1]) => {
    const target = request.target.replace(/^http:\/\/[^/]+/, "");
    const answer = await relay(plain.host, { ...request, target });
    socket.write(`HTTP/1.1 ${answer.status} OK\r\nContent-Length: ${answer.body.length}\r\n\r\n`);
    socket.write(answer.body);
  };

  const registry = await startRawServer(t, forward, { tls, address: "::1" });
  assertPulled(await tryPull(t, `${registry.host}/team/app:1.0`, ca), image);

  // The same server is a proxy for plain HTTP.
  const environment = { HTTP_PROXY: `https://${registry.host}` };
  const given = { ...ca, environment, scheme: "http" as const };
  assertPulled(await tryPull(t, "registry.test/team/app:1.0", given), image);

  const wrong = authority.issueServer({ dns: ["localhost"], ip: ["127.0.0.1"] });
  const other = await startRawServer(t, forward, { tls: wrong, address: "::1" });
  const refused = { ...given, environment: { HTTP_PROXY: `https://${other.host}` } };
  assertFailed(await tryPull(t, "registry.test/team/app:1.0", refused), "TLS", /not for \S*::1/);
  assert.equal(other.requests.length, 0);
});

test("certs.d: HOST:443 and HOST are one registry", async (t) => {
  const client = authority.issueClient({ commonName: "me" });
  const tls = { ...authority.issueServer({ dns: ["registry.test"] }), clientCa: authority.cert };
  const registry = await startRegistry({ tls }, t);
  registry.add(image, "team/app", "1.0");
  const proxy = await startProxy(t, { hosts: { "registry.test:443": registry.host } });
  const environment = { HTTPS_PROXY: proxy.url };
  const files = { "ca.crt": authority.cert, "me.cert": client.cert, "me.key": client.key };
  for (const folder of ["registry.test", "registry.test:443"]) {
    for (const host of ["registry.test", "registry.test:443"]) {
      const certsDirectory = writeFolder(t, folder, files);
      const outcome = await tryPull(t, `${host}/team/app:1.0`, { certsDirectory, environment });
      assertPulled(outcome, image);
    }
  }

  // Each may have a part of it; another port's folder is another registry's.
  const certsDirectory = writeFolder(t, "registry.test", { "ca.crt": authority.cert });
  mkdirSync(join(certsDirectory, "registry.test:443"));
  for (const name of ["me.cert", "me.key"] as const)
    writeFileSync(join(certsDirectory, "registry.test:443", name), files[name]);
  const both = { certsDirectory, environment };
  assertPulled(await tryPull(t, "registry.test/team/app:1.0", both), image);
  const other = { certsDirectory: writeFolder(t, "registry.test:444", files), environment };
  assertFailed(await tryPull(t, "registry.test/team/app:1.0", other), "TLS");
});

describe("client certificates", () => {
  test("a key with a passphrase is said to have one", async (t) => {
    const { registry, reference } = await serve(t, leaf);
    const client = authority.issueClient();
    const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    const secret = { format: "pem", cipher: "aes-256-cbc", passphrase: "4711" } as const;
    const given = { caCert: write(t, "ca.pem", intermediate.cert) };
    for (const type of ["pkcs8", "sec1"] as const) {
      const text = privateKey.export({ ...secret, type }) as string;
      const [tlsCert, tlsKey] = [write(t, "cert.pem", client.cert), write(t, "key.pem", text)];
      const outcome = await tryPull(t, reference, { ...given, tlsCert, tlsKey });
      assertFailed(outcome, "TLS", `\`tlsKey\` ${tlsKey} has a passphrase`, "openssl pkey");

      const files = { "me.cert": client.cert, "me.key": text };
      const certsDirectory = writeFolder(t, registry.host, files);
      const inFolder = await tryPull(t, reference, { ...given, certsDirectory });
      assertFailed(inFolder, "TLS", "me.key has a passphrase");
    }
    assert.equal(registry.requests.length, 0);
  });

  test("a key of another certificate", async (t) => {
    const { reference } = await serve(t, leaf);
    const [tlsCert, tlsKey] = [
      write(t, "cert.pem", authority.issueClient().cert),
      write(t, "key.pem", authority.issueClient().key),
    ];
    const outcome = await tryPull(t, reference, { tlsCert, tlsKey });
    assertFailed(outcome, "TLS", "the key does not belong to the certificate");
  });

  const refusals: [name: string, options: ServerOptions, client: Identity][] = [
    ["a stranger's, TLS 1.3", {}, stranger.issueClient()],
    ["a stranger's, TLS 1.2", { maxVersion: "TLSv1.2" }, stranger.issueClient()],
    ["an expired one", {}, authority.issueClient({ notAfter: new Date("2021-01-01") })],
    ["a server's", {}, authority.issueServer()],
  ];
  for (const [name, options, client] of refusals) {
    test(`${name}: the error speaks of it`, async (t) => {
      let requests = 0;
      const server = createServer(
        {
          ...authority.issueServer(),
          ca: authority.cert,
          requestCert: true,
          rejectUnauthorized: true,
          ...options,
        },
        () => {
          requests += 1;
        },
      );
      server.listen(0, "127.0.0.1");
      await new Promise((done) => server.once("listening", done));
      t.after(() => server.close().closeAllConnections());
      const address = server.address();
      assert(address !== null && typeof address === "object");

      const outcome = await tryPull(t, `127.0.0.1:${address.port}/team/app:1`, {
        tlsCert: write(t, "cert.pem", client.cert),
        tlsKey: write(t, "key.pem", client.key),
        caCert: write(t, "ca.pem", authority.cert),
        retries: 0,
      });
      assert(outcome.error);
      assert.match(outcome.error.message, /client certificate.*`tlsCert` and `tlsKey`/);
      assert.equal(requests, 0);
    });
  }
});

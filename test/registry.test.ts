// What registries, their storage and their token services do beside the specification, one test for
// each, with where it was seen. The first lines of a test are the other side's behaviour, its last
// ones are what users get.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { describe, test } from "node:test";
import { internals, Puller } from "../imgpull.ts";
import { SECRETS, type TestScope, USER } from "./support/command.ts";
import { makeImage, makeMultiPlatform, readTar, type TestImage } from "./support/image.ts";
import { assertFailed, assertPulled, type PullOptions, tryPull } from "./support/pull.ts";
import {
  type AuthOptions,
  type RegistryOptions,
  type RequestRecord,
  startRegistry,
} from "./support/registry.ts";

const HTTP = { scheme: "http" } as const;
const GIVEN = { ...HTTP, username: USER, password: SECRETS.password };
const image = makeImage({ seed: "quirks", layers: [8192, 8192] });
const large = makeImage({ seed: "large", layers: [1_000_000] });

async function serve(t: TestScope, options: RegistryOptions = {}, content: TestImage = image) {
  const registry = await startRegistry(options, t);
  return { registry, reference: registry.add(content, "team/app", "1.0") };
}

const bearer = (more: Partial<AuthOptions> = {}): RegistryOptions => ({
  auth: { mode: "bearer", ...more },
});

/** As `docker login` leaves it. */
function loggedIn(host: string, password: string): PullOptions {
  const auth = Buffer.from(`${USER}:${password}`).toString("base64");
  return {
    ...HTTP,
    environment: { DOCKER_AUTH_CONFIG: JSON.stringify({ auths: { [host]: { auth } } }) },
  };
}

// ====== Challenges ======

describe("several challenges", () => {
  const orders: [name: string, lines: (usual: string) => string[]][] = [
    // google/go-containerregistry#1075: nginx with SPNEGO.
    ["Negotiate before Bearer, each in a header of its own", (usual) => ["Negotiate", usual]],
    // prowler-cloud/prowler#12691; AzureAD/azure-activedirectory-library-for-objc#1042.
    ["Basic before Bearer in one header", (usual) => [`Basic realm="registry", ${usual}`]],
    // AzureAD/azure-activedirectory-library-for-dotnet#888.
    ["Negotiate, NTLM and Bearer in one header", (usual) => [`Negotiate, NTLM, ${usual}`]],
    // Gitea: routers/api/packages/container/container.go, ReqContainerAccess.
    ["Bearer before Basic", (usual) => [usual, 'Basic realm="Gitea Container Registry"']],
  ];
  for (const [name, challenge] of orders) {
    test(name, async (t) => {
      const { registry, reference } = await serve(t, bearer({ challenge, anonymous: "refused" }));
      assertPulled(await tryPull(t, reference, GIVEN), image);
      assert.equal(registry.tokenRequests().length, 1);
    });
  }

  test("Negotiate with Basic as the way out", async (t) => {
    // google/go-containerregistry#1075.
    const challenge = (usual: string) => ["Negotiate", usual];
    const { reference } = await serve(t, { auth: { mode: "basic", challenge } });
    assertPulled(await tryPull(t, reference, GIVEN), image);
  });
});

test("nvcr.io and OpenShift name no service, and get none", async (t) => {
  // sapcc/keppel#731 (nvcr.io); GoogleContainerTools/jib#576 (OpenShift);
  // google/go-containerregistry#1359.
  const { registry, reference } = await serve(t, bearer({ service: null }));
  assertPulled(await tryPull(t, reference, HTTP), image);
  assert.deepEqual(
    registry.tokenRequests().map(({ query }) => query.has("service")),
    [false],
  );
});

test("GCR, Artifactory and Nexus name no scope, Gitea any: the scope is ours", async (t) => {
  // containerd/containerd#1465 (GCR), #3556 (Artifactory); sonatype/nexus-public#659; Gitea's
  // container.go as above; containerd/containerd#4379: GCR takes exactly one.
  for (const scope of [null, "", "*", "repository:other/app:pull", "registry:catalog:*"]) {
    const { registry, reference } = await serve(t, bearer({ scope }));
    assertPulled(await tryPull(t, reference, HTTP), image);
    const scopes = registry.tokenRequests().map(({ query }) => query.getAll("scope"));
    assert.deepEqual(scopes, [["repository:team/app:pull"]]);
  }
});

test("distribution's autoredirect gives a relative realm", async (t) => {
  // distribution/distribution#1458; goharbor/harbor#9794.
  for (const realm of ["/token", "/auth/token", "/v2/token"]) {
    const { registry, reference } = await serve(t, bearer({ realm }));
    assertPulled(await tryPull(t, reference, HTTP), image);
    assert.deepEqual(
      registry.tokenRequests().map(({ path }) => path),
      [realm],
    );
  }
});

test("a realm that has a query keeps it", async (t) => {
  // distribution.github.io/distribution/spec/auth/token: the realm is any URL; a second "?" would
  // spoil it.
  const { registry, reference } = await serve(
    t,
    bearer({ realm: "/token?tenant=a%26b&service=own" }),
  );
  assertPulled(await tryPull(t, reference, HTTP), image);
  const query = registry.tokenRequests()[0]?.query;
  assert.deepEqual(
    [query?.get("tenant"), query?.getAll("service"), query?.getAll("scope")],
    ["a&b", ["test-registry"], ["repository:team/app:pull"]],
  );
});

// ====== Tokens ======

test("ACR answers access_token instead of token", async (t) => {
  // containerd/overlaybd#35; google/go-containerregistry#54.
  const { reference } = await serve(t, bearer({ tokenField: "access_token" }));
  assertPulled(await tryPull(t, reference, HTTP), image);
});

test("GitLab's tokens last five minutes, whatever its clock says", async (t) => {
  // moby/moby#33558 (GitLab: 5 min); a floor of 60 s is containers/image's
  // minimumTokenLifetimeSeconds.
  for (const issuedAt of ["2001-01-01T00:00:00Z", "2099-01-01T00:00:00Z"]) {
    const { registry, reference } = await serve(
      t,
      bearer({ expiresIn: 300, tokenFields: { issued_at: issuedAt } }),
    );
    let now = Date.UTC(2026, 0, 1);
    registry.on(
      { kind: "config" },
      {
        handler: async (_request, _response, next) => {
          now += 250_000;
          await next();
        },
      },
    );
    assertPulled(await tryPull(t, reference, { ...HTTP, now: () => now, concurrency: 1 }), image);
    assert.equal(registry.tokenRequests().length, 1);
  }
});

test("ECR Public answers 400, without a challenge, to a token that has expired", async (t) => {
  // aws/containers-roadmap#2835.
  const { registry, reference } = await serve(t, bearer({ staleStatus: 400 }), large);
  const rule = registry.on({ kind: "layer", times: 1 }, { dropAfter: 400_000 });
  assertPulled(
    await tryPull(t, reference, { ...HTTP, onSleep: () => registry.expireTokens() }),
    large,
  );
  assert.equal(rule.hits, 1);
  assert.deepEqual(
    registry.requests.slice(-3).map(({ kind, status }) => `${kind} ${status}`),
    ["layer 400", "token 200", "layer 206"],
  );
});

test("400 to a request without a token is not a stale token", async (t) => {
  const { registry, reference } = await serve(t);
  registry.on({ kind: "manifest" }, { status: 400 });
  assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", "400");
  assert.equal(registry.requests.length, 1);
});

test("GHCR says denied to stale credentials, also for public images", async (t) => {
  // dexidp/dex#2672; github/github-mcp-server#282.
  const { registry, reference } = await serve(t, bearer({ refusedStatus: 403 }));
  const outcome = await tryPull(t, reference, loggedIn(registry.host, "expired"));
  assertPulled(outcome, image);
  assert.match(outcome.warnings.join("\n"), /DOCKER_AUTH_CONFIG.*refused/);
});

test("nvcr.io names another realm once a token has expired, where nobody anonymous gets one", async (t) => {
  // NVIDIA/nvidia-container-toolkit#1945.
  const { registry, reference } = await serve(t, bearer(), large);
  const closed = registry.on({ path: "/closed/token" }, { status: 401 });
  registry.on({ kind: "layer", times: 1 }, { dropAfter: 400_000 });
  const challenge = 'Bearer realm="/closed/token",service="registry",error="invalid_token"';
  const stale = { kind: "layer", times: 1, beforeAuth: true, ranged: true } as const;
  registry.on(stale, { status: 401, headers: { "www-authenticate": challenge } });
  assertPulled(
    await tryPull(t, reference, { ...HTTP, onSleep: () => registry.expireTokens() }),
    large,
  );
  assert(closed.hits <= 1);
});

test("GCR answers OAuth2's POST by 404, Artifactory by 401, ACR by 400, Harbor by 405", async (t) => {
  // containerd: core/remotes/docker/authorizer.go, the comments at its fallback;
  // containerd/containerd#8630 (Harbor).
  const environment = (host: string) => ({
    DOCKER_AUTH_CONFIG: JSON.stringify({
      auths: { [host]: { username: USER, identitytoken: SECRETS.identityToken } },
    }),
  });
  for (const postStatus of [404, 401, 400, 405]) {
    const auth = bearer({ anonymous: "refused", password: SECRETS.identityToken, postStatus });
    const { registry, reference } = await serve(t, auth);
    const outcome = await tryPull(t, reference, {
      ...HTTP,
      environment: environment(registry.host),
    });
    assertPulled(outcome, image);
    assert.deepEqual(
      registry.tokenRequests().map(({ method, status }) => `${method} ${status}`),
      [`POST ${postStatus}`, "GET 200"],
    );
    assert.deepEqual([outcome.warnings, outcome.waitsMs], [[], []]);
  }
});

test("GitLab answers OAuth2's POST by 404 in HTML", async (t) => {
  // containerd/containerd#12822.
  const { registry, reference } = await serve(
    t,
    bearer({ anonymous: "refused", password: SECRETS.identityToken }),
  );
  const html = {
    status: 404,
    body: "<!DOCTYPE html><html>404</html>",
    headers: { "content-type": "text/html" },
  };
  registry.on({ kind: "token", method: "POST" }, html);
  const entry = { username: USER, identitytoken: SECRETS.identityToken };
  const environment = { DOCKER_AUTH_CONFIG: JSON.stringify({ auths: { [registry.host]: entry } }) };
  assertPulled(await tryPull(t, reference, { ...HTTP, environment }), image);
});

// ====== Storage ======

test("S3 and Azure answer 400 to a signed URL that comes with an Authorization", async (t) => {
  // open-policy-agent/opa#6728 (ECR and S3: "Only one auth mechanism allowed"); Azure/acr#217.
  for (const mode of ["basic", "bearer"] as const) {
    const { registry, reference } = await serve(t, { auth: { mode, anonymous: "refused" } });
    const rule = registry.on({ kind: "blob" }, { redirect: "storage" });
    assertPulled(await tryPull(t, reference, GIVEN), image);
    assert.equal(rule.hits, 3);
    assert.deepEqual(
      registry.storageRequests().map(({ status }) => status),
      [200, 200, 200],
    );
  }
});

test("registry.k8s.io redirects manifests too, to another repository of another registry", async (t) => {
  // kubernetes/registry.k8s.io: cmd/archeio/docs/request-handling.md.
  const back = await startRegistry({}, t);
  back.add(image, "k8s-artifacts-prod/images/app", "1.0");
  const front = await startRegistry({}, t);
  const target = (url: string) =>
    back.url + url.replace("team/app", "k8s-artifacts-prod/images/app");
  const rule = front.on({}, { redirect: ({ url }) => target(url) });
  const outcome = await tryPull(t, `${front.host}/team/app:1.0`, HTTP);
  assertPulled(outcome, image);
  assert.equal(rule.hits, 4);
  assert.equal(outcome.result?.name, `${front.host}/team/app:1.0`);
});

test("the target of a redirect has a challenge of its own, for its own repository", async (t) => {
  // google/go-containerregistry#2360: its token is asked of its own realm, anonymously.
  const { registry: back } = await serve(t, bearer());
  back.add(image, "prod/app", "1.0");
  for (const name of ["team/app", "prod/app"]) {
    back.forget();
    const { registry: front, reference } = await serve(t, { auth: "basic" });
    front.on({}, { redirect: ({ url }) => back.url + url.replace("team/app", name) });
    assertPulled(await tryPull(t, reference, GIVEN), image);
    const sent = back.requests.map(({ headers }) => headers.authorization ?? "");
    assert(!sent.some((header) => header.startsWith("Basic")), `${name}: the front's credentials`);
    assert.deepEqual(
      back.tokenRequests().map(({ query }) => query.get("scope")),
      [`repository:${name}:pull`],
    );
  }
});

test("a storage host that asks for a login gets none, and ends the pull", async (t) => {
  // mlflow/mlflow#25744: a blob host must not choose where the registry's credentials go.
  const catcher = await startRegistry(bearer({ anonymous: "refused" }), t);
  for (const challenge of ['Basic realm="storage"', `Bearer realm="${catcher.tokenUrl}"`]) {
    const { registry, reference } = await serve(t, { auth: "basic", storage: { challenge } });
    registry.on({ kind: "layer" }, { redirect: "storage" });
    const outcome = await tryPull(t, reference, { ...GIVEN, retries: 1 });
    assert(outcome.error);
    assert(["UNAUTHORIZED", "FORBIDDEN"].includes(outcome.error.code), outcome.error.message);
    const sent = [...registry.storageRequests(), ...catcher.requests].map(
      ({ headers }) => headers.authorization,
    );
    assert.deepEqual(new Set(sent), new Set([undefined]));
  }
});

test("a signed URL that has expired when it is used: the registry gives another", async (t) => {
  // docker-archive-public/docker.kitematic#4713 (403); distribution/distribution#4175 (S3's 400 to
  // an old session).
  for (const status of [403, 400, 401]) {
    const { registry, reference } = await serve(t);
    registry.on({ kind: "layer" }, { redirect: "storage" });
    const body = "<Error><Code>AccessDenied</Code></Error>";
    const rule = registry.on({ kind: "storage", times: 1 }, { status, body });
    assertPulled(await tryPull(t, reference, HTTP), image);
    assert.equal(rule.hits, 1);
    assert.equal(registry.blobRequests().length, 4);
  }
});

test("a download that breaks off goes on by a new signed URL, from where it stopped", async (t) => {
  const { registry, reference } = await serve(t, { storage: { singleUse: true } }, large);
  registry.on({ kind: "layer" }, { redirect: "storage" });
  const rule = registry.on({ kind: "storage", times: 1 }, { dropAfter: 500_000 });
  const outcome = await tryPull(t, reference, HTTP);
  assertPulled(outcome, large);
  assert.equal(rule.hits, 1);
  assert.equal(new Set(registry.storageRequests().map(({ url }) => url)).size, 2);
  assert(
    registry.storageRequests().every(({ status }) => status < 300),
    "the old URL was not used again",
  );
  assert(registry.bytesServed() <= 1.1 * 1_000_000);
});

// ====== Ranges ======

test("caches that are cold ignore Range and answer the whole", async (t) => {
  // distribution/distribution#4667; goharbor/harbor#23875.
  const { registry, reference } = await serve(t, {}, large);
  registry.on({ kind: "layer", times: 1 }, { dropAfter: 500_000 });
  const cold = registry.on({ kind: "layer", ranged: true }, { ignoreRange: true });
  const outcome = await tryPull(t, reference, HTTP);
  assertPulled(outcome, large);
  assert.equal(cold.hits, 1);
});

test("go-containerregistry's own registry takes only closed ranges", async (t) => {
  // anchore/stereoscope#695: `bytes=N-` gets 416 there.
  const { registry, reference } = await serve(t, {}, large);
  registry.on({ kind: "layer", times: 3 }, { dropAfter: 200_000 });
  registry.on(
    { kind: "layer", where: ({ range }) => range?.endsWith("-") === true },
    { status: 416 },
  );
  assertPulled(await tryPull(t, reference, HTTP), large);
  const ranges = registry.blobRequests(large.layers[0]?.digest).map(({ range }) => range);
  assert.deepEqual(ranges, [
    undefined,
    "bytes=200000-999999",
    "bytes=400000-999999",
    "bytes=600000-999999",
  ]);
});

// ====== Headers ======

test("manifests come as text/html, text/plain, application/json, with parameters, or as nothing", async (t) => {
  // moby/moby#19526 (quay.io: text/html), containers/image#417 (text/plain), containerd/cri#787
  // (application/json), moby/moby#31318 (none, a static server), goharbor/harbor#7853
  // (application/octet-stream).
  const types: ((own: string) => string | null)[] = [
    () => "text/html",
    () => "text/plain; charset=utf-8",
    () => "application/json",
    () => "application/octet-stream",
    () => "",
    () => null,
    (own) => `${own}; charset=utf-8`,
    (own) => own.toUpperCase(),
  ];
  for (const format of ["oci", "docker"] as const) {
    // OCI's mediaType within the manifest is optional: then the shape of the JSON is all that there
    // is.
    const bare = (manifest: object) => ({ ...manifest, mediaType: undefined });
    const index = makeMultiPlatform(["linux/amd64"], {
      format,
      editManifest: bare,
      editIndex: bare,
    });
    for (const type of types) {
      const registry = await startRegistry({}, t);
      const rules = [...index.manifests].map(([digest, { mediaType }]) =>
        registry.on({ digest }, { headers: { "content-type": type(mediaType) } }),
      );
      assertPulled(
        await tryPull(t, registry.add(index, "team/app", "1"), HTTP),
        index.children[0] ?? index,
      );
      assert.deepEqual(
        rules.map(({ hits }) => hits),
        [1, 1],
      );
    }
  }
});

test("a block page under 200 is not a manifest", async (t) => {
  // docker/cli#5304: a firewall's HTML without a Content-Type.
  for (const headers of [{ "content-type": null }, { "content-type": "text/html" }]) {
    const { registry, reference } = await serve(t);
    registry.on({ kind: "manifest" }, { body: "<html><title>Forbidden</title></html>", headers });
    assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", "not a manifest", "is 127.0.0.1");
  }
});

test("configs were once labelled text/html, application/json, octet-stream or nothing", async (t) => {
  // moby/moby#30083, #22378; distribution/distribution#1621. Docker takes these four for an image's
  // config.
  for (const mediaType of ["text/html", "application/json", "application/octet-stream", ""]) {
    const old = makeImage({
      format: "docker",
      editManifest: (manifest) => ({ ...manifest, config: { ...manifest.config, mediaType } }),
    });
    const { reference } = await serve(t, {}, old);
    const outcome = await tryPull(t, reference, HTTP);
    assertPulled(outcome, old);
    const tar = readFileSync(outcome.tar);
    const entry = readTar(tar).find(({ name }) => name === "manifest.json");
    const listed = JSON.parse(
      String(entry && tar.subarray(entry.offset, entry.offset + entry.size)),
    ) as object[];
    assert.equal(listed.length, 1, `config of type "${mediaType}"`);
  }
});

test("HEAD comes without a digest (ECR, Red Hat), or without a length (Harbor)", async (t) => {
  // distribution/distribution#3792 (ECR), containerd/containerd#3238 (Red Hat),
  // goharbor/harbor#13793; harrisonwang/wharf#11 (a length of 0).
  const { registry, reference } = await serve(t);
  const expected = { mediaType: image.mediaType, digest: image.digest, size: image.bytes.length };
  const faults = [
    { headers: { "docker-content-digest": null } },
    { headers: { "content-length": null } },
    { headers: { "content-length": "0" } },
    { headers: { "content-type": "text/plain" } },
    { headers: { "docker-content-digest": "sha256:zz" } },
  ];
  for (const fault of faults) {
    const rule = registry.on({ method: "HEAD" }, fault);
    const head = await new Puller({ url: reference, ...HTTP }).headManifest();
    assert.deepEqual(head, expected, JSON.stringify(fault));
    assert.equal(rule.hits, 1);
    rule.remove();
  }
  registry.forget();
  assert.deepEqual(await new Puller({ url: reference, ...HTTP }).headManifest(), expected);
  assert.deepEqual(
    registry.requests.map(({ method }) => method),
    ["HEAD"],
    "a HEAD that tells all is enough",
  );
});

test("Docker Hub's digest header may be that of another manifest: the bytes decide", async (t) => {
  // opencontainers/distribution-spec#207.
  const { registry, reference } = await serve(t);
  const rule = registry.on(
    { kind: "manifest" },
    { headers: { "docker-content-digest": `sha256:${"0".repeat(64)}` } },
  );
  const outcome = await tryPull(t, reference, HTTP);
  assertPulled(outcome, image);
  assert.equal(outcome.result?.digest, image.digest);
  assert.equal(rule.hits, 1);
});

test("registry.access.redhat.com compresses configs in transfer, whatever is asked for", async (t) => {
  // quay/quay#1310.
  for (const kind of ["config", "manifest", "layer"] as const) {
    const { registry, reference } = await serve(t);
    const rule = registry.on({ kind }, { contentEncoding: "gzip" });
    assertPulled(await tryPull(t, reference, HTTP), image);
    assert(rule.hits > 0);
  }
});

test("a file server labels a layer that is gzip itself with Content-Encoding: the bytes are the layer's", async (t) => {
  // moby/moby#17595 (Apache: x-gzip).
  for (const encoding of ["x-gzip", "gzip"]) {
    const { registry, reference } = await serve(t);
    const rule = registry.on({ kind: "layer" }, { headers: { "content-encoding": encoding } });
    assertPulled(await tryPull(t, reference, HTTP), image);
    assert.equal(rule.hits, 2);
  }
});

test("Trow and others tell no length", async (t) => {
  // containerd/containerd#5124.
  for (const contentLength of ["chunked", "close"] as const) {
    const { reference, registry } = await serve(t, {}, large);
    registry.on({}, { contentLength });
    assertPulled(await tryPull(t, reference, HTTP), large);
  }
});

// ====== Errors ======

test("a registry that finds no type acceptable is asked for any", async (t) => {
  // deitch/docker_registry2#40: 406 to a config that is asked for with the types of manifests;
  // Nexus to manifests.
  const accept = "application/vnd.oci.image.manifest.v1+json";
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const choosy = {
    where: ({ headers }: RequestRecord) => headers.accept?.includes(accept) === true,
  };
  for (const kind of ["manifest", "blob"] as const) {
    const registry = await startRegistry({}, t);
    const rule = registry.on({ kind, ...choosy }, { status: 406 });
    const outcome = await tryPull(t, registry.add(index, "team/app", "1.0"), HTTP);
    assertPulled(outcome, index.children[0] as TestImage);
    assert.equal(
      rule.hits,
      kind === "manifest" ? 1 : 0,
      "it is not asked again what it does not take",
    );
    assert.equal(registry.manifestRequests().length, kind === "manifest" ? 3 : 2);
    assert.deepEqual([outcome.waitsMs, outcome.warnings], [[], []]);
  }
  const { registry, reference } = await serve(t);
  registry.on({ kind: "manifest" }, { status: 406 });
  assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", "406");
  assert.equal(registry.requests.length, 2);
});

describe("what a storage host says where it refuses", () => {
  // moby/moby#31327: S3's and Azure's XML; what else is markup is a page that nobody wants in a
  // terminal.
  const REFUSALS: [name: string, body: string, said: RegExp][] = [
    [
      "S3",
      `<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>RequestTimeTooSkewed</Code><Message>The difference ` +
        `between the request time &amp; the server&apos;s is too large.</Message><AWSAccessKeyId>AKIA</AWSAccessKeyId></Error>`,
      /answered 403 \(RequestTimeTooSkewed: The difference between the request time & the server's is too large\.\)/,
    ],
    [
      "Azure, with a byte order mark",
      "\ufeff<?xml version='1.0'?><Error><Code>AuthenticationFailed</Code><Message>Server failed.\nRequestId:1</Message></Error>",
      /answered 403 \(AuthenticationFailed: Server failed\. RequestId:1\)/,
    ],
    ["a code alone", "<Error><Code>AccessDenied</Code></Error>", /answered 403 \(AccessDenied\)/],
    ["a page", "<html><head><title>Error</title><Code>x</Code></head></html>", /answered 403$/m],
    ["an XML of another kind", "<Code>x</Code>", /answered 403$/m],
  ];
  for (const [name, body, said] of REFUSALS) {
    test(name, async (t) => {
      const { registry, reference } = await serve(t);
      registry.on({ kind: "layer" }, { redirect: "storage" });
      registry.on({ kind: "storage" }, { status: 403, body });
      const { error } = await tryPull(t, reference, { ...HTTP, retries: 0 });
      assert.match(error?.message ?? "", said);
      assert.doesNotMatch(error?.message ?? "", /AKIA/);
    });
  }
});

test("Harbor and others spell a missing tag UNKNOWN", async (t) => {
  // buildpacks/lifecycle#304: 404 decides, not the code.
  for (const code of ["UNKNOWN", "NOT_FOUND", "MANIFEST_INVALID"]) {
    const { registry, reference } = await serve(t);
    const body = JSON.stringify({ errors: [{ code, message: "not here" }] });
    registry.on({ kind: "manifest" }, { status: 404, body });
    assertFailed(
      await tryPull(t, reference, HTTP),
      "NOT_FOUND",
      "no such tag",
      `${code}: not here`,
    );
  }
});

test("Docker Hub answers 401 for a repository that does not exist, which the error says", async (t) => {
  // openSUSE/open-build-service#13056.
  const { reference } = await serve(t, bearer({ anonymous: "useless" }));
  assertFailed(await tryPull(t, reference, HTTP), "UNAUTHORIZED", "does not exist");
});

describe("Retry-After", () => {
  // RFC 9110 §10.2.3; containers/image#618 (quay.io: 429), containerd/containerd#14066.
  const NOW = Date.UTC(2026, 0, 1, 12);
  const waits: [name: string, header: string | null, sleeps: number[]][] = [
    ["absent: half a second to a second", null, [internals.LIMITS.firstBackoffMs]],
    ["seconds", "17", [17_000]],
    ["a date", new Date(NOW + 42_000).toUTCString(), [42_000]],
    [
      "a date that has passed",
      new Date(NOW - 1000).toUTCString(),
      [internals.LIMITS.firstBackoffMs],
    ],
    ["nonsense", "soon", [internals.LIMITS.firstBackoffMs]],
    ["a fraction, which Date takes for a day in 2001", "90.5", [internals.LIMITS.firstBackoffMs]],
    ["less than nothing", "-5", [internals.LIMITS.firstBackoffMs]],
    ["two in one line", "2, 3", [internals.LIMITS.firstBackoffMs]],
    ["the longest that is waited for", "120", [120_000]],
  ];
  for (const [name, header, sleeps] of waits) {
    for (const status of [429, 503]) {
      test(`${name} (${status})`, async (t) => {
        const { registry, reference } = await serve(t);
        registry.on({ kind: "manifest", times: 1 }, { status, headers: { "retry-after": header } });
        const outcome = await tryPull(t, reference, { ...HTTP, now: () => NOW });
        assertPulled(outcome, image);
        assert.deepEqual(outcome.waitsMs, sleeps);
      });
    }
  }

  test("beyond two minutes the pull ends at once, saying when to come back", async (t) => {
    for (const header of ["3600", new Date(NOW + 3_600_000).toUTCString()]) {
      for (const [status, code] of [
        [429, "RATE_LIMITED"],
        [503, "PROTOCOL"],
      ] as const) {
        const { registry, reference } = await serve(t);
        registry.on({ kind: "manifest" }, { status, headers: { "retry-after": header } });
        const outcome = await tryPull(t, reference, { ...HTTP, now: () => NOW });
        assertFailed(outcome, code, "3600 s", "2026-01-01T13:00:00");
        assert.deepEqual(outcome.waitsMs, []);
        assert.equal(registry.requests.length, 1);
      }
    }
  });

  test("beyond a year it is told in words, whatever the number", async (t) => {
    const dates = ["Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 99999 23:59:59 GMT"];
    for (const header of ["99999999999999999999999999", "40000000", "9".repeat(400), ...dates]) {
      for (const status of [429, 503]) {
        const { registry, reference } = await serve(t);
        registry.on({ kind: "manifest" }, { status, headers: { "retry-after": header } });
        const outcome = await tryPull(t, reference, { ...HTTP, now: () => NOW });
        const code = status === 429 ? "RATE_LIMITED" : "PROTOCOL";
        assertFailed(outcome, code, "not to come back for more than a year");
        assert.doesNotMatch(outcome.error?.message ?? "", /e\+|Infinity|\d{9}| s, at/);
        assert.deepEqual(outcome.waitsMs, []);
      }
    }
  });

  test("what is no time to come back is not told as one", async (t) => {
    for (const header of ["-5", "90.5", "2, 3", "soon", new Date(NOW - 1000).toUTCString(), "0"]) {
      const { registry, reference } = await serve(t);
      registry.on({ kind: "manifest" }, { status: 429, headers: { "retry-after": header } });
      const outcome = await tryPull(t, reference, { ...HTTP, now: () => NOW, retries: 0 });
      assertFailed(outcome, "RATE_LIMITED", "try again later");
    }
  });
});

// X.509 certificates for the test servers, made in memory: an encoder of the little DER that they
// need.
import { createHash, generateKeyPairSync, type KeyObject, sign } from "node:crypto";

export interface Identity {
  /** PEM of the certificate and of its PKCS#8 key. */
  cert: string;
  key: string;
}

export interface IssueOptions {
  commonName?: string;
  /** Names of a server; default localhost and 127.0.0.1. */
  dns?: string[];
  ip?: string[];
  notBefore?: Date;
  notAfter?: Date;
}

export interface Authority extends Identity {
  /** An intermediate authority that this one has signed. */
  issueAuthority(commonName: string): Authority;
  issueServer(options?: IssueOptions): Identity;
  issueClient(options?: Omit<IssueOptions, "dns" | "ip">): Identity;
}

function der(tag: number, ...parts: Buffer[]): Buffer {
  const content = Buffer.concat(parts);
  const { length } = content;
  if (length >= 65536) throw new Error("too long for this encoder");
  const long = length < 256 ? [0x81, length] : [0x82, length >> 8, length & 255];
  const size = length < 128 ? [length] : long;
  return Buffer.concat([Buffer.from([tag, ...size]), content]);
}

const sequence = (...parts: Buffer[]) => der(0x30, ...parts);
const integer = (...bytes: number[]) => der(0x02, Buffer.from(bytes));
const octets = (content: Buffer) => der(0x04, content);
const bits = (content: Buffer, unused = 0) => der(0x03, Buffer.from([unused]), content);
const TRUE = der(0x01, Buffer.from([0xff]));

function oid(dotted: string): Buffer {
  const [first = 0, second = 0, ...rest] = dotted.split(".").map(Number);
  const bytes = [first * 40 + second];
  for (const arc of rest) {
    const groups = [arc & 127];
    for (let left = Math.floor(arc / 128); left > 0; left = Math.floor(left / 128))
      groups.unshift((left & 127) | 128);
    bytes.push(...groups);
  }
  return der(0x06, Buffer.from(bytes));
}

/** RFC 5280 4.1.2.5: two-digit years up to 2049, four digits from 2050. */
function time(date: Date): Buffer {
  const digits = `${date.toISOString().replace(/\.\d+Z$|\D/g, "")}Z`;
  return date.getUTCFullYear() < 2050
    ? der(0x17, Buffer.from(digits.slice(2)))
    : der(0x18, Buffer.from(digits));
}

function distinguishedName(commonName: string): Buffer {
  return sequence(der(0x31, sequence(oid("2.5.4.3"), der(0x0c, Buffer.from(commonName)))));
}

function extension(id: string, content: Buffer, critical = false): Buffer {
  return critical ? sequence(oid(id), TRUE, octets(content)) : sequence(oid(id), octets(content));
}

/** Of IPv6 only ::1 is needed. */
function addressBytes(address: string): Buffer {
  if (address === "::1") return Buffer.from([...Array(15).fill(0), 1]);
  return Buffer.from(address.split(".").map(Number));
}

function alternativeNames(dns: string[], ip: string[]): Buffer {
  const addresses = ip.map((address) => der(0x87, addressBytes(address)));
  return sequence(...dns.map((name) => der(0x82, Buffer.from(name))), ...addresses);
}

interface Issuer {
  name: string;
  privateKey: KeyObject;
  publicKey: KeyObject;
}

const publicInfo = (key: KeyObject) => key.export({ type: "spki", format: "der" });
const keyIdentifier = (key: KeyObject) => createHash("sha1").update(publicInfo(key)).digest();
const ECDSA_WITH_SHA256 = sequence(oid("1.2.840.10045.4.3.2"));
let serial = 0;

function issue(
  issuer: Issuer,
  name: string,
  publicKey: KeyObject,
  options: IssueOptions,
  extensions: Buffer[],
): string {
  const {
    notBefore = new Date("2020-01-01T00:00:00Z"),
    notAfter = new Date("2099-12-31T23:59:59Z"),
  } = options;
  serial += 1;
  const body = sequence(
    der(0xa0, integer(2)),
    integer(1, (serial >> 8) & 255, serial & 255),
    ECDSA_WITH_SHA256,
    distinguishedName(issuer.name),
    sequence(time(notBefore), time(notAfter)),
    distinguishedName(name),
    publicInfo(publicKey),
    der(
      0xa3,
      sequence(
        ...extensions,
        extension("2.5.29.14", octets(keyIdentifier(publicKey))),
        extension("2.5.29.35", sequence(der(0x80, keyIdentifier(issuer.publicKey)))),
      ),
    ),
  );
  const certificate = sequence(
    body,
    ECDSA_WITH_SHA256,
    bits(sign("sha256", body, issuer.privateKey)),
  );
  const lines = certificate.toString("base64").replace(/.{64}(?=.)/g, "$&\n");
  return `-----BEGIN CERTIFICATE-----\n${lines}\n-----END CERTIFICATE-----\n`;
}

const pem = (key: KeyObject) => key.export({ type: "pkcs8", format: "pem" }).toString();

/**
 * A certificate authority of its own; those that it issues hold from 2020 to 2099 unless told
 * otherwise.
 */
export function makeAuthority(commonName = "imgpull test CA"): Authority {
  const pair = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const self: Issuer = { name: commonName, ...pair };
  return authorityOf(self, issueAuthority(self, self));
}

function issueAuthority(by: Issuer, { name, publicKey }: Issuer): string {
  return issue(by, name, publicKey, {}, [
    extension("2.5.29.19", sequence(TRUE), true),
    extension("2.5.29.15", bits(Buffer.from([0b00000110]), 1), true),
  ]);
}

function authorityOf(issuer: Issuer, cert: string): Authority {
  const issueLeaf = (
    name: string,
    options: IssueOptions,
    purpose: string,
    names: Buffer[],
  ): Identity => {
    const leaf = generateKeyPairSync("ec", { namedCurve: "P-256" });
    const extensions = [
      extension("2.5.29.15", bits(Buffer.from([0b10000000]), 7), true),
      extension("2.5.29.37", sequence(oid(purpose))),
      ...names,
    ];
    return {
      cert: issue(issuer, name, leaf.publicKey, options, extensions),
      key: pem(leaf.privateKey),
    };
  };
  return {
    cert,
    key: pem(issuer.privateKey),
    issueServer: (options = {}) => {
      const {
        commonName: name = "imgpull test server",
        dns = ["localhost"],
        ip = ["127.0.0.1"],
      } = options;
      const hasNames = dns.length + ip.length > 0;
      const names = hasNames ? [extension("2.5.29.17", alternativeNames(dns, ip))] : [];
      return issueLeaf(name, options, "1.3.6.1.5.5.7.3.1", names);
    },
    issueClient: (options = {}) =>
      issueLeaf(options.commonName ?? "imgpull test client", options, "1.3.6.1.5.5.7.3.2", []),
    issueAuthority: (commonName) => {
      const pair = generateKeyPairSync("ec", { namedCurve: "P-256" });
      const intermediate: Issuer = { name: commonName, ...pair };
      return authorityOf(intermediate, issueAuthority(issuer, intermediate));
    },
  };
}

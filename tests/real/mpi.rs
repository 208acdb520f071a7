//! Open MPI over its TCP transport: four ranks in two guests.

use crate::common::{self, profile_dir};
use crate::kit::{self, PATHS, Site, number, on_lane, source};
use std::path::Path;

/// What `mpirun` starts its daemon on the other host with, in the place of ssh: HOST COMMAND…
fn remote_shell(site: &Site, verb: &str) -> String {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/lab");
    let text = format!(
        "#!/bin/sh\nshift\nexec env -u LD_PRELOAD -u VSOCKET_AGENT LAB={} VSOCKET_BIN={} {} {verb} {} -- {} sh -c \"$*\"\n",
        site.lab.name,
        std::env::var("VSOCKET_BIN").unwrap_or_else(|_| profile_dir().display().to_string()),
        lab.display(),
        site.server(),
        named("there"),
    );
    let file = site.text(&format!("shell-{verb}"), &text);
    kit::prepare(&["chmod", "755", &file]);
    file
}

/// Open MPI takes two machines of one name for one.
fn named(name: &str) -> String {
    format!("unshare --uts sh -c 'hostname {name}; exec \"$@\"' -")
}

#[test]
fn open_mpi() {
    if !kit::have(&["mpirun:openmpi-bin", "mpicc:libopenmpi-dev"]) {
        return;
    }
    for path in PATHS {
        let site = Site::new("mpi", path);
        let program = site.at("ring");
        kit::prepare(&["mpicc", "-O2", "-o", &program, &source("mpi.c")]);
        let hosts = format!("{}:2,{}:2", site.ip_of("a"), site.ip());
        let mut sums = Vec::new();
        // Neighbours in the ring are in different guests, so two connections between guests each, and those of the daemons.
        site.compare("ring of 4, 4 MiB messages", "MB/s", on_lane(4, 400 << 20), |verb| {
            let shell = remote_shell(&site, verb);
            let command = format!(
                "exec {} mpirun --allow-run-as-root --oversubscribe -np 4 --map-by node --host {hosts} --bind-to none \
                 --mca plm_rsh_agent {shell} --mca btl tcp,self --mca pml ob1 --mca btl_tcp_if_include eth0 \
                 --mca oob_tcp_if_include eth0 {program}",
                named("here"),
            );
            let out = site.lab.start(verb, "a", &["sh", "-c", &command]).ends(common::PROGRAM).ok();
            sums.push(number(&out, "allreduce/s"));
            number(&out, "mbyte/s")
        });
        kit::figure("mpi", "allreduce of 4, 8 B to 1 MiB", path, "op/s", (sums[0], sums[1]));
    }
}
